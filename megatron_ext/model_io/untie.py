"""A model whose embedding is its output layer too, as one that has both: the same function of two matrices."""

from dataclasses import replace

from torch import Tensor

from megatron_ext.canonical.catalogue import EMBEDDING, OUTPUT
from megatron_ext.checkpoint.streams import TensorSource
from megatron_ext.errors import ConversionError
from megatron_ext.model_io.open import Checkpoint


class _WithOutputLayer:
    """The tensors of a tied model, and its embedding again as the output layer."""

    def __init__(self, source: TensorSource) -> None:
        self._source = source
        self.specs = {**source.specs, OUTPUT: source.specs[EMBEDDING]}

    def read(self, name: str) -> Tensor:
        """One whole tensor."""
        return self._source.read(EMBEDDING if name == OUTPUT else name)


def untied(opened: Checkpoint) -> Checkpoint:
    """`opened` with an output layer of its own, equal to the embedding until one of them is trained.

    Raises:
        ConversionError: it has one.
    """
    if opened.model.untie_embeddings_and_output_weights:
        raise ConversionError(f"{opened.directory}: has an output layer of its own; leave out --untie")
    return with_two_ends(opened)


def with_two_ends(opened: Checkpoint) -> Checkpoint:
    """`opened` with an output layer of its own, if it has none."""
    if opened.model.untie_embeddings_and_output_weights:
        return opened
    model = replace(opened.model, untie_embeddings_and_output_weights=True)
    return replace(opened, model=model, tensors=_WithOutputLayer(opened.tensors))
