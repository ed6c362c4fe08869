"""Initial weights drawn by parameter name: any parallel layout starts from the same model."""

from collections.abc import Iterable, Mapping

import torch

from megatron_ext.canonical.adapters import adapter_tensors
from megatron_ext.canonical.catalogue import CanonicalTensor, Normal, model_tensors
from megatron_ext.canonical.naming import StorageLocation, tensors_by_location
from megatron_ext.canonical.seeds import seed_from_name
from megatron_ext.config import LoraConfig, ModelConfig
from megatron_ext.errors import TrainingError
from megatron_ext.mcore.state import ParameterShard, shards_of


def initialize_weights(
    model: ModelConfig, chunks: list[torch.nn.Module], seed: int, adapters: LoraConfig | None = None
) -> None:
    """Fill every parameter of `chunks` (the model chunks of this rank, with `adapters`) as the catalogue says.

    Each global tensor (each expert of a stacked one) is drawn from a generator seeded by `seed` and its checkpoint
    key, and this rank keeps its slice.

    Raises:
        TrainingError: a parameter is not in the catalogue, or has another shape there.
    """
    tensors = model_tensors(model)
    if adapters is not None:
        tensors |= adapter_tensors(model, adapters)
    draw_tensors(tensors, [parameter for chunk in chunks for parameter in chunk.parameters()], chunks, seed)


@torch.no_grad()
def draw_tensors(
    tensors: Mapping[str, CanonicalTensor],
    parameters: Iterable[torch.nn.Parameter],
    chunks: list[torch.nn.Module],
    seed: int,
) -> None:
    """Fill those `parameters` of `chunks` as `tensors`, by canonical name, says; raises as `initialize_weights`."""
    known, wanted = tensors_by_location(tensors), set(parameters)
    for chunk in chunks:
        for weight, pieces in shards_of(chunk).items():
            for piece in pieces if weight in wanted else ():
                piece.data.copy_(_draw(_entry(known, piece), piece, seed))


def _entry(known: dict[StorageLocation, CanonicalTensor], piece: ParameterShard) -> CanonicalTensor:
    """The catalogue's entry of the tensor that `piece` is a shard of."""
    stacked = len(piece.global_shape) - piece.data.dim()
    location = StorageLocation(piece.key, tuple(piece.offset[:stacked]))
    tensor = known.get(location)
    if tensor is None:
        raise TrainingError(
            f"{piece.key} {list(location.index)}: not in the catalogue of tensors, so nothing says how it is "
            "initialised and split; add it to megatron_ext/canonical/catalogue.py"
        )
    if tensor.shape != piece.global_shape[stacked:]:
        raise TrainingError(
            f"{piece.key}: is {list(piece.global_shape[stacked:])} in the network, and {list(tensor.shape)} as "
            f"{tensor.name} in the catalogue of tensors (megatron_ext/canonical/catalogue.py)"
        )
    return tensor


def _draw(tensor: CanonicalTensor, piece: ParameterShard, seed: int) -> torch.Tensor:
    """The initial values of one shard."""
    initial = tensor.initial
    if isinstance(initial, Normal) and not initial.std:
        return torch.full_like(piece.data, initial.mean)
    stacked = len(piece.global_shape) - piece.data.dim()
    name = ".".join((piece.key, *map(str, piece.offset[:stacked])))
    generator = torch.Generator(device=piece.data.device).manual_seed(seed_from_name(seed, name))
    whole = torch.empty(tensor.shape, device=piece.data.device)
    if isinstance(initial, Normal):
        whole.normal_(initial.mean, initial.std, generator=generator)
    else:
        whole.uniform_(-initial.bound, initial.bound, generator=generator)
    for dim, (start, size) in enumerate(zip(piece.offset[stacked:], piece.data.shape, strict=True)):
        whole = whole.narrow(dim, start, size)
    return whole
