"""One save of a checkpoint by all ranks: taken while training waits, written on a thread of each rank while it goes on.

What is not finished never looks complete: everything is written beside the final name, which it gets last. Each rank
leaves a note when its file is on disk; the first rank waits for all notes and completes the checkpoint. So nothing
that happens between two steps is a collective, which would hang where a rank died; nor is there another process.
"""

import contextlib
import logging
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_ext.checkpoint.collective import NOT_SAVED, on_first_rank, said_by_ranks, together
from megatron_ext.checkpoint.find import checkpoint_name
from megatron_ext.checkpoint.finite import require_finite
from megatron_ext.checkpoint.host_memory import HostMemory
from megatron_ext.checkpoint.publish import publish, remove_leftovers, write_small_files
from megatron_ext.checkpoint.rank_note import Failed, RankNote, noted_ranks, read_note, remove_notes, write_note
from megatron_ext.checkpoint.shards import TensorShard
from megatron_ext.checkpoint.state_file import read_saved, write_random_states
from megatron_ext.checkpoint.torch_dist import ChunkRecord, TorchDistWriter, write_metadata
from megatron_ext.errors import CheckpointError
from megatron_ext.files import UNFINISHED
from megatron_ext.manifest import FileSum, write_manifest

log = logging.getLogger(__name__)

_LOOKS = (0.01, 0.5)
"""Seconds between two looks for notes, at first and at most."""
_SEEN_WITHIN = 60.0
"""Seconds in which a folder that another host has made is seen on every file system that is shared."""
_PATIENCE = 20.0
"""Seconds without a new note after which a run that has failed gives up what it was saving."""


@dataclass(frozen=True)
class SmallFiles:
    """What a checkpoint holds besides tensors, as it was when the save began."""

    iteration: int
    scalars: Mapping[str, Any]
    """The content of `state.json`."""
    run: dict[str, Any]
    """The resolved configuration, as plain mappings."""
    random_state: bytes | None = None
    """Of this rank, as torch.save writes it."""
    tokenizer: Path | None = None
    """Directory whose tokenizer the checkpoint carries."""


@dataclass(frozen=True)
class Outcome:
    """How a save ended."""

    iteration: int
    checkpoint: Path
    error: CheckpointError | None
    """Why it was not saved; None where it is complete."""
    stalled: float
    """Seconds that training waited for this rank's copy."""
    seconds: float
    """From the beginning until it was complete, as far as this rank knows."""
    bytes: int
    """Of all tensors; 0 on all ranks but the first."""


class Save:
    """One save, as one rank sees it. Every rank calls `begin` and `finish`; between them nobody needs anybody.

    Args:
        directory: the run's.
        published: called with the complete checkpoint, on the first rank; what it raises is a warning.
    """

    def __init__(self, directory: Path, content: SmallFiles, published: Callable[[Path], None]) -> None:
        self.final = directory / checkpoint_name(content.iteration)
        self._partial = self.final.with_name(self.final.name + UNFINISHED)
        self._content, self._published = content, published
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self._begun = time.monotonic()
        self._stalled = 0.0
        self._seconds: float | None = None
        self._bytes = 0
        self._thread: threading.Thread | None = None
        self._written, self._given_up = threading.Event(), threading.Event()
        self._not_written: CheckpointError | None = None
        """Why this rank's file is not there."""
        self._not_complete: CheckpointError | None = None
        """Why the checkpoint is not, on the first rank."""

    def begin(self, shards: Sequence[TensorShard], memory: HostMemory | None) -> None:
        """Take what is to be saved; afterwards the shards may change.

        Args:
            memory: where they are copied to, to be written on a thread; without it, or without room, they are written
                here and now.

        Raises:
            NotFiniteError: a number is not finite; on every rank, and nothing is left.
            CheckpointError: it cannot be begun; likewise.
        """
        copies: list[list[TensorShard] | None] = []

        def take() -> None:
            if self._rank == 0:
                remove_leftovers(self.final.parent)
                self._partial.mkdir(parents=True)
            require_finite(shards)
            copies.append(memory.copied(shards) if memory is not None else None)

        with self._leaving_nothing():
            together(take)
        [copied] = copies
        if copied is None:
            self._write(shards)
        if memory is not None:
            self._thread = threading.Thread(target=self._work, args=(copied,), name="checkpoint", daemon=True)
            self._thread.start()
        self._stalled = time.monotonic() - self._begun

    def has_ended(self) -> bool:
        """Whether this rank's part is over, and on the first one all."""
        return self._thread is not None and not self._thread.is_alive()

    def outcome(self) -> Outcome:
        """How it ended, once it has; what the others know is not asked."""
        seconds = self._seconds if self._seconds is not None else time.monotonic() - self._begun
        error = self._not_written or self._not_complete
        return Outcome(self._content.iteration, self.final, error, self._stalled, seconds, self._bytes)

    def finish(self) -> Outcome:
        """Wait until the checkpoint is complete or has failed, the same on every rank; then nothing is left of it."""
        try:
            with self._leaving_nothing():
                self._written.wait()
                together(lambda: _raise(self._not_written))
                if self._rank == 0:
                    if self._thread is None:
                        self._complete()
                    else:
                        self._thread.join()
                on_first_rank(lambda: _raise(self._not_complete))
        except CheckpointError as error:
            self._not_complete, self._not_written = error, None
        return self.outcome()

    def finish_alone(self) -> None:
        """After the run has failed: let what is on its way be completed, as far as the other ranks do their part.

        No collective. Every rank stays until it is over, for launchers end all ranks when the first one ends.
        """
        if self._thread is None:
            return
        log.info("%s is being written; the run ends when it is", self.final)
        self._written.wait()
        notes, deadline = -1, time.monotonic() + _PATIENCE
        while self._partial.is_dir() and time.monotonic() < deadline:
            time.sleep(_LOOKS[1] / 10)
            with contextlib.suppress(OSError):
                if (found := len(noted_ranks(self._partial))) != notes:
                    notes, deadline = found, time.monotonic() + _PATIENCE
        self._given_up.set()
        self._thread.join(_PATIENCE)

    @contextlib.contextmanager
    def _leaving_nothing(self) -> Iterator[None]:
        """Remove what is unfinished where the save fails."""
        try:
            yield
        except CheckpointError:
            self._given_up.set()
            if self._thread is not None:
                self._thread.join()
            if self._rank == 0:
                shutil.rmtree(self._partial, ignore_errors=True)  # a full disk needs the room
            raise

    def _work(self, copies: Sequence[TensorShard] | None) -> None:
        """The thread."""
        if copies is not None:
            self._write(copies)
        if self._rank == 0:
            self._complete()

    def _write(self, shards: Sequence[TensorShard]) -> None:
        """Write this rank's file and its note, or why not."""
        name = f"__{self._rank}_0.distcp"
        try:
            self._await_folder()
            chunks, file_sum = _write_shards(self._partial, name, shards)
            write_note(self._partial, self._rank, RankNote(name, chunks, file_sum, self._content.random_state))
        except Exception as error:  # noqa: BLE001 - whatever it is, the run goes on, and people are told
            self._not_written = _fault(error)
            with contextlib.suppress(OSError):
                (self._partial / name).unlink(missing_ok=True)  # a full disk needs the room, if only for the note
                write_note(self._partial, self._rank, Failed(f"rank {self._rank}: {error}"))
        finally:
            self._written.set()

    def _await_folder(self) -> None:
        """Wait until this host sees what the first rank has made."""
        deadline = time.monotonic() + _SEEN_WITHIN
        while not self._partial.is_dir():
            if time.monotonic() > deadline or self._given_up.wait(_LOOKS[1]):
                raise CheckpointError(
                    f"{self._partial}, made by rank 0, is not there on {socket.gethostname()}: checkpoint.directory "
                    "must be on a file system that every node sees (checkpoint.copy_to is for another place)"
                )

    def _complete(self) -> None:
        """On the first rank: wait for all files, write what joins them, and give the checkpoint its name."""
        try:
            partial, content = self._partial, self._content
            sums, states = self._join_files()
            write_small_files(partial, content.iteration, content.scalars, content.run, content.tokenizer)
            write_random_states(partial, states)
            remove_notes(partial)
            write_manifest(partial, sums)
            publish(partial, self.final, content.iteration)
            self._bytes = sum(file_sum.bytes for file_sum in sums.values())
            self._seconds = time.monotonic() - self._begun
        except Exception as error:  # noqa: BLE001 - as above
            self._not_complete = _fault(error)
            return
        try:
            self._published(self.final)
        except OSError as error:
            log.warning("%s is complete, but older ones could not be removed: %s", self.final, error)

    def _join_files(self) -> tuple[dict[str, FileSum], list[dict[str, Any] | None]]:
        """Write the metadata of all ranks' files; return the files' sums and the random states of the ranks."""
        sums: dict[str, FileSum] = {}
        states: list[dict[str, Any] | None] = []

        def chunks() -> Iterator[ChunkRecord]:
            for rank in range(self._size):
                note = read_note(self._partial, rank)
                assert isinstance(note, RankNote)
                sums[note.file] = note.sum
                states.append(None if note.random_state is None else read_saved(note.random_state))
                yield from note.chunks

        if failed := self._await_notes():
            shutil.rmtree(self._partial, ignore_errors=True)  # nobody writes there any more
            raise CheckpointError(said_by_ranks(NOT_SAVED, failed))
        write_metadata(self._partial, chunks())
        return sums, states

    def _await_notes(self) -> list[str]:
        """Wait until every rank has left a note; return those of the ranks that failed."""
        pause, longest = _LOOKS
        while len(noted_ranks(self._partial)) < self._size:
            if self._given_up.wait(pause):
                raise CheckpointError("given up")
            pause = min(pause * 1.5, longest)
        notes = (read_note(self._partial, rank) for rank in range(self._size))
        return [note.why for note in notes if isinstance(note, Failed)]


def _write_shards(partial: Path, name: str, shards: Sequence[TensorShard]) -> tuple[list[ChunkRecord], FileSum]:
    """Write this rank's file; return its chunks and its sum."""
    writer = TorchDistWriter(partial, name)
    try:
        for shard in shards:
            if shard.is_writer:
                writer.write(shard.key, shard.global_shape, shard.offset, shard.data)
        return writer.finish(), writer.sum
    except BaseException:
        writer.abandon()
        raise


def _fault(error: Exception) -> CheckpointError:
    if isinstance(error, CheckpointError):
        return error
    told = isinstance(error, OSError | RuntimeError)
    return CheckpointError(str(error) if told else f"{type(error).__name__}: {error}")


def _raise(error: CheckpointError | None) -> None:
    if error is not None:
        raise error
