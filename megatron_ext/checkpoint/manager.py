"""A run's checkpoints: saved, polled and restored without knowing what is in them. Each kind of state registers once.

    manager = CheckpointManager("runs/moe", to_mapping(run), keep_last=3)
    manager.register("optimizer", tensors=..., scalars=..., restore=...)
    checkpoint = manager.save(iteration=100)
    manager.restore(checkpoint)

Tensors are shards of global tensors, whose keys are those in the checkpoint; scalars are entries of its `state.json`.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_ext.checkpoint.find import find_checkpoint
from megatron_ext.checkpoint.load import load_shards
from megatron_ext.checkpoint.run_file import read_run
from megatron_ext.checkpoint.save import SmallFiles, StagedSave, finish, stage
from megatron_ext.checkpoint.shards import TensorShard
from megatron_ext.checkpoint.state_file import RNG_FILE, STATE_FILE, read_random_state, read_scalars
from megatron_ext.errors import CheckpointError
from megatron_ext.foreign import reading

Scalars = Mapping[str, Any]
"""Values that JSON can hold, by their keys in `state.json`."""


@dataclass(frozen=True)
class StateEntry:
    """One kind of state of this rank. What it returns is asked for at each save, and at each restore."""

    tensors: Callable[[], Sequence[TensorShard]]
    """Shards, views of the live memory: saving reads them, restoring fills them."""
    scalars: Callable[[], Scalars]
    """Always under the same keys, which no other entry has. Those of rank 0 are saved."""
    restore: Callable[[Scalars], None]
    """Takes back what `scalars` returned, after the tensors are filled. What an older checkpoint lacks is not there."""


@dataclass(frozen=True)
class RankState:
    """What each rank has of its own, and only a run of the same layout takes back: its random numbers."""

    capture: Callable[[], dict[str, Any]]
    """In values that torch.load(weights_only=True) reads."""
    restore: Callable[[dict[str, Any]], None]


def _no_tensors() -> Sequence[TensorShard]:
    return ()


def _no_scalars() -> Scalars:
    return {}


def _takes_nothing(scalars: Scalars) -> None:
    """What an entry without scalars restores."""


class CheckpointManager:
    """The checkpoints of one run. Every rank has one and calls each of its methods in the same order.

    Args:
        directory: where they stand.
        run: the resolved configuration, as plain mappings; saved in each, as it is then.
        tokenizer: directory whose tokenizer each checkpoint carries.
        keep_last: remove all but this many when a newer one is complete (never the newest two); None keeps all.
        rank_state: what each rank saves of its own.
    """

    def __init__(
        self,
        directory: str | Path,
        run: dict[str, Any],
        *,
        tokenizer: Path | None = None,
        keep_last: int | None = None,
        rank_state: RankState | None = None,
    ) -> None:
        self.directory = Path(directory)
        self.run, self._tokenizer, self._keep_last = run, tokenizer, keep_last
        self._rank_state = rank_state
        self._entries: dict[str, StateEntry] = {}
        self._staged: StagedSave | None = None

    def register(
        self,
        name: str,
        *,
        tensors: Callable[[], Sequence[TensorShard]] = _no_tensors,
        scalars: Callable[[], Scalars] = _no_scalars,
        restore: Callable[[Scalars], None] = _takes_nothing,
    ) -> None:
        """Have a kind of state saved and restored from now on; see `StateEntry`.

        Raises:
            ValueError: another entry has this name, or a key of its scalars.
        """
        taken = {key for entry in self._entries.values() for key in entry.scalars()}
        if name in self._entries or (twice := taken & scalars().keys()):
            raise ValueError(f"{name}: {'registered twice' if name in self._entries else f'{twice} are taken'}")
        self._entries[name] = StateEntry(tensors, scalars, restore)

    def tensors(self, only: Collection[str] | None = None) -> list[TensorShard]:
        """The shards of all entries, or of those named."""
        return [shard for entry in self._chosen(only) for shard in entry.tensors()]

    def newest(self) -> Path | None:
        """The newest checkpoint; None in a new run. CheckpointError where it is not complete."""
        return find_checkpoint(self.directory)

    def save(self, iteration: int) -> Path:
        """Save everything after step `iteration`, and return the checkpoint.

        Raises:
            CheckpointError: a rank could not write, or a number is not finite; on every rank, and nothing is left.
        """
        self.stage(iteration)
        return self.finish()

    def stage(self, iteration: int) -> None:
        """The half of `save` that training must wait for; raises what `save` does."""
        if not self.poll():
            raise RuntimeError("a save is staged already: finish it before the next")
        scalars = {key: value for entry in self._entries.values() for key, value in entry.scalars().items()}
        own = self._rank_state.capture() if self._rank_state is not None else None
        content = SmallFiles(iteration, scalars, self.run, own, self._tokenizer)
        self._staged = stage(self.directory, self.tensors(), content)

    def finish(self) -> Path:
        """The other half, which reads nothing that training changes; raises what `save` does."""
        if (staged := self._staged) is None:
            raise RuntimeError("no save is staged")
        self._staged = None
        return finish(staged, self._keep_last)

    def poll(self) -> bool:
        """Whether everything that was staged is finished, so that the next save can begin."""
        return self._staged is None

    def restore(self, which: Path, only: Collection[str] | None = None) -> None:
        """Put back what the checkpoint `which` holds, saved in any layout.

        Args:
            only: names of the entries that are restored; the others stay as they are.

        Raises:
            CheckpointError: it is damaged, or lacks what an entry must have.
        """
        saved = read_scalars(which)
        load_shards(which, self.tensors(only))
        for entry in self._chosen(only):
            own = {key: saved[key] for key in entry.scalars() if key in saved}
            with reading(which / STATE_FILE, CheckpointError):
                entry.restore(own)
        if self._rank_state is not None and self.has_layout_of(which):
            own_state = read_random_state(which, dist.get_rank())
            if own_state is not None:
                with reading(which / RNG_FILE, CheckpointError):
                    self._rank_state.restore(own_state)

    def has_layout_of(self, which: Path) -> bool:
        """Whether `which` was saved in the parallel layout of this run."""
        return bool(read_run(which).get("parallel") == self.run.get("parallel"))

    def close(self) -> None:
        """Finish what is staged. Not after a failure: another rank may never come to it."""
        if not self.poll():
            self.finish()

    def _chosen(self, only: Collection[str] | None) -> list[StateEntry]:
        names = self._entries if only is None else only
        return [self._entries[name] for name in names]
