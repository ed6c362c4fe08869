"""The weights that a new run starts from: a Megatron checkpoint, or what another room of the house opens."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from megatron_ext.checkpoint.find import require_checkpoint
from megatron_ext.checkpoint.integrity import require_whole_together
from megatron_ext.checkpoint.load import ShardReader, fill_shards, load_shards
from megatron_ext.checkpoint.shards import TensorShard
from megatron_ext.checkpoint.state_file import require_whole_model
from megatron_ext.config import ModelConfig
from megatron_ext.training.same_run import check_models_agree, check_same_model

log = logging.getLogger(__name__)


class ForeignWeights(Protocol):
    """Weights that are not stored as a Megatron checkpoint, such as those of a Hugging Face directory."""

    @property
    def directory(self) -> Path:
        """Where they are."""

    @property
    def model(self) -> ModelConfig:
        """Whose they are; its vocabulary padding means nothing."""

    @property
    def run(self) -> dict[str, Any]:
        """The configuration of their training; empty where nothing says it."""

    @property
    def tokenizer(self) -> Path | None:
        """Directory of the tokenizer that comes with them."""

    def shards(self, padded_vocab_size: int) -> ShardReader:
        """Reads them under the keys of a Megatron checkpoint, with the vocabulary padded to that many rows."""


OpenForeign = Callable[[Path], ForeignWeights | None]
"""Opens what is at a path; None where that is for a Megatron checkpoint to say."""


def no_foreign_weights(path: Path) -> None:
    """Knows Megatron checkpoints alone."""


def foreign_model(weights: ForeignWeights, model: ModelConfig) -> ModelConfig:
    """The model of `weights` with the vocabulary padding of `model`."""
    return replace(weights.model, make_vocab_size_divisible_by=model.make_vocab_size_divisible_by)


def load_weights(path: Path, model: ModelConfig, shards: Sequence[TensorShard], open_foreign: OpenForeign) -> None:
    """Fill the model weights `shards` from what is at `path`. Every rank must call this.

    Raises:
        CheckpointError: they are of another model than `model`, incomplete or damaged.
    """
    foreign = open_foreign(path)
    if foreign is None:
        checkpoint = require_checkpoint(path)
        require_whole_model(checkpoint)
        check_same_model(model, checkpoint)
        load_shards(checkpoint, shards)
    else:
        checkpoint, theirs = foreign.directory, foreign_model(foreign, model)
        check_models_agree(model, theirs, checkpoint)
        require_whole_together(checkpoint)
        fill_shards(foreign.shards(theirs.padded_vocab_size), checkpoint, shards)
    log.info("weights from %s", checkpoint)
