"""A run's checkpoints: saved, polled and restored without knowing what is in them. Each kind of state registers once.

    manager = CheckpointManager("runs/moe", to_mapping(run), retention=Retention(keep_last=3), asynchronous=True)
    manager.register("optimizer", tensors=..., scalars=..., restore=...)
    manager.stage(iteration=100)            # training waits for this
    ...                                     # and goes on; manager.poll() says whether it is written
    checkpoint = manager.finish()
    manager.restore(checkpoint)

Tensors are shards of global tensors, whose keys are those in the checkpoint; scalars are entries of its `state.json`.
"""

import contextlib
import json
import socket
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_ext.checkpoint.collective import gathered, on_first_rank_slowly
from megatron_ext.checkpoint.copier import Copied, Copier
from megatron_ext.checkpoint.find import find_checkpoint
from megatron_ext.checkpoint.host_memory import HostMemory
from megatron_ext.checkpoint.load import load_shards
from megatron_ext.checkpoint.publish import remove_leftovers
from megatron_ext.checkpoint.retention import Retention, remove_superseded
from megatron_ext.checkpoint.run_file import RUN_FILE, read_run
from megatron_ext.checkpoint.save import Outcome, Save, SmallFiles
from megatron_ext.checkpoint.second_place import SecondPlace
from megatron_ext.checkpoint.shards import TensorShard
from megatron_ext.checkpoint.state_file import RNG_FILE, STATE_FILE, read_random_state, read_scalars, saved_bytes
from megatron_ext.config import ParallelConfig, load_config
from megatron_ext.errors import CheckpointError, ConfigError
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


KEEP_ALL = Retention()


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
        retention: which of them stay when a newer one is complete.
        second_place: where the newest is copied to, while the run goes on.
        rank_state: what each rank saves of its own.
        asynchronous: what is staged is copied and written while the run goes on; else `stage` writes it.
    """

    def __init__(
        self,
        directory: str | Path,
        run: dict[str, Any],
        *,
        tokenizer: Path | None = None,
        retention: Retention = KEEP_ALL,
        second_place: SecondPlace | None = None,
        rank_state: RankState | None = None,
        asynchronous: bool = False,
    ) -> None:
        self.directory = Path(directory)
        self.run, self._tokenizer, self._retention = run, tokenizer, retention
        self._rank_state = rank_state
        self._entries: dict[str, StateEntry] = {}
        self._memory = HostMemory(_ranks_of_this_host()) if asynchronous else None
        self._save: Save | None = None
        self._settled: list[Outcome] = []
        self._keepers: list[Callable[[], Collection[Path]]] = []
        self._copies = second_place is not None
        self._copier: Copier | None = None
        """On the first rank, where there is a second place."""
        if second_place is not None and dist.get_rank() == 0:
            self._copier = Copier(self.directory, second_place, retention)

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
        """The half of `save` that training must wait for.

        Raises:
            NotFiniteError, CheckpointError: as `save`, as far as it is known.
            RuntimeError: what was staged before is not settled.
        """
        if self._save is not None:
            raise RuntimeError("a save is staged already: finish it before the next")
        scalars = {key: value for entry in self._entries.values() for key, value in entry.scalars().items()}
        own = saved_bytes(self._rank_state.capture()) if self._rank_state is not None else None
        # Through JSON, where it goes anyway: what an entry has handed out may be a list that goes on growing.
        content = SmallFiles(iteration, json.loads(json.dumps(scalars)), self.run, own, self._tokenizer)
        save = Save(self.directory, content, self._published)
        save.begin(self.tensors(), self._memory)
        self._save = save

    def poll(self) -> bool:
        """Whether this rank has nothing more to do for what was staged, so that settling it takes no time.

        On the first rank: whether it is complete, or has failed. Asks no other rank.
        """
        return self._save is None or self._save.has_ended()

    def outcome(self) -> Outcome | None:
        """On the first rank, what has become of the save that is staged; None as long as nothing has, or none is."""
        return self._save.outcome() if self._save is not None and dist.get_rank() == 0 and self.poll() else None

    def settle(self) -> Outcome | None:
        """Wait until what is staged is complete or has failed, the same on every rank; None where nothing is."""
        if self._save is None:
            return None
        save, self._save = self._save, None
        outcome = save.finish()
        self._settled.append(outcome)
        return outcome

    def settled(self) -> list[Outcome]:
        """What was settled since this was asked last."""
        settled, self._settled = self._settled, []
        return settled

    def finish(self) -> Path:
        """The other half of `save`, which reads nothing that training changes; raises what `save` does."""
        if (outcome := self.settle()) is None:
            raise RuntimeError("no save is staged")
        if outcome.error is not None:
            raise outcome.error
        return outcome.checkpoint

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
        return bool(_layout(read_run(which)) == _layout(self.run))

    def keep(self, in_use: Callable[[], Collection[Path]]) -> None:
        """Let the checkpoints that `in_use` says stay for now, on the first rank; it is asked from another thread."""
        self._keepers.append(in_use)

    def lag(self) -> int | None:
        """On the first rank, steps by which the second place is behind; None where there is none."""
        return self._copier.lag() if self._copier is not None else None

    def copied(self) -> list[Copied]:
        """On the first rank, what became of copies since this was asked last."""
        return self._copier.copied() if self._copier is not None else []

    def close(self) -> None:
        """Finish what is staged, and copying it. Not after a failure: another rank may never come to it.

        Raises:
            CheckpointError: what is staged was not saved, or the newest checkpoint could not be copied; on every rank.
        """
        if self._save is not None:
            self.finish()
        if self._copies:
            self._finish_copying()
        if dist.get_rank() == 0:  # a run that was killed in its last save, and has nothing more to save
            with contextlib.suppress(OSError):
                remove_leftovers(self.directory)

    def close_alone(self) -> None:
        """After a failure: let what is staged be written to its end, if no rank that is gone is needed."""
        if self._save is not None:
            self._save.finish_alone()

    def _finish_copying(self) -> None:
        """Wait for the copy of the newest checkpoint; every rank must call this."""
        copier = self._copier
        on_first_rank_slowly(
            lambda: copier.finish() if copier is not None else None,
            f"the run is saved in {self.directory}, but its newest checkpoint is not at its second place; the same "
            "command again copies it",
        )

    def _published(self, checkpoint: Path) -> None:
        """On the first rank's thread: `checkpoint` is complete."""
        in_use = [path for keeper in self._keepers for path in keeper()]
        if self._copier is not None:
            in_use += [path for path in (self._copier.in_use,) if path is not None]
            self._copier.wake()
        remove_superseded(self.directory, self._retention, in_use)

    def _chosen(self, only: Collection[str] | None) -> list[StateEntry]:
        names = self._entries if only is None else only
        return [self._entries[name] for name in names]


def _ranks_of_this_host() -> int:
    """Every rank must call this."""
    return gathered(socket.gethostname()).count(socket.gethostname())


def _layout(run: Mapping[str, Any]) -> Any:
    """The section that says it, with what is newer than it at its default."""
    said = run.get("parallel")
    try:
        return load_config(ParallelConfig, said or {}, source=RUN_FILE)
    except ConfigError:
        return said
