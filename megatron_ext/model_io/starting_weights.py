"""The weights of a Hugging Face directory as training starts from them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.config import ModelConfig
from megatron_ext.model_io.huggingface.model_card import run_of_card
from megatron_ext.model_io.open import Checkpoint, is_hugging_face, open_checkpoint, with_padding
from megatron_ext.model_io.streamed_shards import StreamedShards


@dataclass(frozen=True)
class HuggingFaceWeights:
    """An open Hugging Face directory, in the words of training/start.py."""

    opened: Checkpoint

    @property
    def directory(self) -> Path:
        """Where it is."""
        return self.opened.directory

    @property
    def model(self) -> ModelConfig:
        """Its model."""
        return self.opened.model

    @property
    def run(self) -> dict[str, Any]:
        """The configuration that trained it, from its model card."""
        return run_of_card(self.directory)

    @property
    def tokenizer(self) -> Path | None:
        """The tokenizer in it."""
        return self.opened.tokenizer

    def shards(self, padded_vocab_size: int) -> StreamedShards:
        """Its tensors under the keys of a Megatron checkpoint."""
        return StreamedShards(with_padding(self.opened, padded_vocab_size))


def open_hugging_face(path: Path) -> HuggingFaceWeights | None:
    """The weights at `path` where that is a Hugging Face directory, otherwise None."""
    return HuggingFaceWeights(open_checkpoint(path)) if is_hugging_face(path) else None
