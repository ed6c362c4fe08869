"""A model that text goes into and comes out of: a Hugging Face directory, or any checkpoint, exported for the time."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from megatron_ext.checkpoint.find import require_checkpoint
from megatron_ext.checkpoint.state_file import holds_adapters
from megatron_ext.data.tokenizer import load_tokenizer
from megatron_ext.errors import CheckpointError, DataError, EnvironmentFault
from megatron_ext.merging.lora import merge_lora, silent
from megatron_ext.merging.lora_options import MergeLoraOptions
from megatron_ext.model_io.checkpoint_model import tokenizer_directory
from megatron_ext.model_io.compare import Comparison
from megatron_ext.model_io.convert import convert
from megatron_ext.model_io.finite import describe, is_finite
from megatron_ext.model_io.logits import load_hugging_face
from megatron_ext.model_io.open import is_hugging_face

# What transformers' models call the table of learned positions.
_POSITION_TABLES = ("wpe", "embed_positions", "position_embeddings")


@dataclass(frozen=True)
class TextModel:
    """A network that transformers computes with, and its tokenizer."""

    name: str
    """What messages call it."""
    directory: Path
    network: Any
    tokenizer: Any
    positions: int | None
    """How many positions it has learned; None where they are computed, and so have no end."""

    @property
    def rows(self) -> int:
        """Tokens that it embeds."""
        return int(self.network.get_input_embeddings().weight.shape[0])


def require_model(checkpoint: str | Path) -> None:
    """Raise CheckpointError where there is neither a Hugging Face directory nor a whole checkpoint, before the work."""
    if not is_hugging_face(checkpoint):
        require_checkpoint(checkpoint)


@contextmanager
def text_model(checkpoint: str | Path, *, trust_remote_code: bool = False, device: str = "cpu") -> Iterator[TextModel]:
    """Open `checkpoint`, in fp32, as transformers computes with it: it generates with a cache.

    Raises:
        DataError: it has no tokenizer.
        CheckpointError: its weights are no numbers.
        EnvironmentFault: there is no such device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise EnvironmentFault(
            f"device = 'cuda': torch finds no CUDA device (torch {torch.__version__}); take --device cpu, or check the "
            "driver with nvidia-smi"
        )
    with hugging_face_directory(checkpoint) as directory:
        yield _loaded(directory, checkpoint, trust_remote_code, device)


@contextmanager
def hugging_face_directory(checkpoint: str | Path, *, verify: bool = False) -> Iterator[Path]:
    """`checkpoint` itself, or a temporary export of a Megatron one (where it holds adapters, with their base).

    The exported model's logits are the checkpoint's (tools/verify.py).

    Args:
        verify: compare weights and logits of the export with the checkpoint's. Of adapters there is nothing to compare:
            their merge is its own.

    Raises:
        DataError: it has no tokenizer.
        ConversionError: the export is not the same model.
    """
    if is_hugging_face(checkpoint):
        yield Path(checkpoint)
        return
    if tokenizer_directory(checkpoint) is None:
        raise DataError(
            f"{checkpoint}: carries no tokenizer to read prompts with; tools/convert.py {checkpoint} HF_DIRECTORY "
            "--tokenizer DIR makes a model that has one"
        )
    with tempfile.TemporaryDirectory(prefix="megatron-ext-") as directory:
        exported = Path(directory) / "export"
        if holds_adapters(require_checkpoint(checkpoint)):
            merge_lora(MergeLoraOptions(adapters=str(checkpoint), target=str(exported), to="hf"), silent)
        else:
            convert(checkpoint, exported, verify=Comparison() if verify else None)
        yield exported


def _loaded(directory: Path, name: str | Path, trust_remote_code: bool, device: str) -> TextModel:
    tokenizer = load_tokenizer(directory, trust_remote_code=trust_remote_code)
    network = load_hugging_face(directory, trust_remote_code=trust_remote_code)
    weights = network.state_dict()
    if broken := [key for key, weight in weights.items() if not is_finite(weight)]:
        raise CheckpointError(
            f"{name}: {describe(broken, len(weights))}, so that nothing can be generated; take a checkpoint from before"
        )
    return TextModel(str(name), directory, network.to(device), tokenizer, learned_positions(network))


def learned_positions(network: nn.Module) -> int | None:
    """How many positions `network` has learned; None where they are computed, and so have no end."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _POSITION_TABLES:
            configuration: Any = network.config
            return min(module.num_embeddings, int(configuration.max_position_embeddings))
    return None
