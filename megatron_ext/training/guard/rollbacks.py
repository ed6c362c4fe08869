"""Where a run has gone back and must not go again, from which checkpoint, and how the learning rate rises after it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_ext.checkpoint.find import complete_checkpoints, iteration_of


@dataclass(frozen=True)
class PastRollback:
    """One that has happened."""

    step: int
    """Noticed at it, counted from 1."""
    checkpoint: int
    """Step of the checkpoint that weights and optimizer were taken from."""
    resumed: int
    """Steps that were behind the run then."""
    rewarm: int
    """Steps over which the learning rate rose afterwards."""

    def rate_factor(self, step: int) -> float:
        """What the learning rate of `step`, counted from 0, is multiplied by."""
        after = step - self.resumed
        return (after + 1) / self.rewarm if 0 <= after < self.rewarm else 1.0

    def has_left(self, checkpoint: int) -> bool:
        """Whether the run has gone back from a checkpoint."""
        return self.checkpoint < checkpoint <= self.step

    def to_json(self) -> dict[str, int]:
        """For a checkpoint."""
        return asdict(self)

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> "PastRollback":
        """What `to_json` returned."""
        return cls(**{name: int(saved[name]) for name in cls.__dataclass_fields__})


def choose_checkpoint(directory: Path, newest: int, past: list[PastRollback], group: Any) -> Path | None:
    """The newest complete checkpoint of no more than `newest` steps that the run has not gone back from.

    Rank 0 looks for all, so that what a shared disk shows elsewhere does not matter; every rank must call this.
    """
    chosen: list[Path | None] = [None]
    if dist.get_rank(group) == 0:
        for checkpoint in complete_checkpoints(directory):
            step = iteration_of(checkpoint)
            if step <= newest and not any(one.has_left(step) for one in past):
                chosen = [checkpoint]
    if dist.get_world_size(group) > 1:
        dist.broadcast_object_list(chosen, src=dist.get_global_rank(group, 0), group=group)
    return chosen[0]
