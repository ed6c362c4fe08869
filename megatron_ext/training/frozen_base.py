"""The weights beside which a run trains and which its checkpoints do not hold: the same at each resume."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_ext.checkpoint.fingerprint import fingerprint, fingerprint_sum
from megatron_ext.checkpoint.shards import TensorShard
from megatron_ext.checkpoint.state_file import BASE_KEY
from megatron_ext.config import RunConfig, to_mapping
from megatron_ext.errors import CheckpointError
from megatron_ext.mcore.build import Trainable
from megatron_ext.mcore.transformer_config import DTYPES
from megatron_ext.training.start import OpenForeign, load_weights

log = logging.getLogger(__name__)


class FrozenBase:
    """The base of a run, on this rank, once it is loaded."""

    def __init__(self, run: RunConfig, trainable: Trainable, open_foreign: OpenForeign, device: torch.device) -> None:
        assert run.adapters is not None
        assert run.checkpoint.initialize_from is not None
        self._run, self._adapters = run, run.adapters
        self._trainable, self._open_foreign, self._device = trainable, open_foreign, device
        self.path = Path(run.checkpoint.initialize_from)
        load_weights(self.path, run.model, trainable.base_weights(), open_foreign)
        self.fingerprint = self._in_memory()

    def mend(self) -> None:
        """Load the base again where it is not what was loaded. Every rank must call this.

        No checkpoint of the run holds it, so that going back to one heals no bit that has flipped in it.
        """
        if self._in_memory() == self.fingerprint:
            return
        log.warning("the weights beside the adapters had changed in memory; they are loaded from %s again", self.path)
        load_weights(self.path, self._run.model, self._trainable.base_weights(), self._open_foreign)

    def _in_memory(self) -> str:
        """The fingerprint of the base as it is now, over all ranks."""
        return fingerprint_of_weights(self._trainable.base_weights(), self._run, self._device)

    def record(self) -> dict[str, Any]:
        """What a checkpoint says of it, for whoever needs both together."""
        adapters = to_mapping(self._adapters)
        return {BASE_KEY: {"path": str(self.path.resolve()), "fingerprint": self.fingerprint, "adapters": adapters}}

    def check(self, saved: Mapping[str, Any]) -> None:
        """Raise CheckpointError where a checkpoint's adapters were trained beside another base."""
        if (record := saved.get(BASE_KEY)) is None:
            return
        if record["fingerprint"] != self.fingerprint:
            raise CheckpointError(
                f"checkpoint.initialize_from = {str(self.path)!r}: holds other weights ({self.fingerprint}) than those "
                f"beside which the adapters were trained ({record['fingerprint']}, of {record['path']}); set it and "
                "precision.kind back, or start a new run in another checkpoint.directory"
            )


def fingerprint_of_weights(shards: Sequence[TensorShard], run: RunConfig, device: torch.device) -> str:
    """What is recorded of the weights of which every rank has its `shards`; every rank must call this."""
    # As two numbers, so that no sum overflows differently from one library to another.
    total = fingerprint_sum(shards, run.model.vocab_size) % 2**64
    halves = torch.tensor([total & 0xFFFFFFFF, total >> 32], dtype=torch.int64, device=device)
    dist.all_reduce(halves)
    low, high = halves.tolist()
    return fingerprint(low + (high << 32), DTYPES[run.precision.kind])
