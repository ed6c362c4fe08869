"""The stream of global batches that a run trains on: each rank takes its micro-batches of every one.

Nothing is drawn from the process's random numbers while reading, so that the numbers of dropout are the same however
often a stream was begun: in a run that was interrupted, as in one that was not.
"""

import contextlib
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from megatron_ext.data.stream.batches import DocumentResets, MicroBatch, collate, sample_indices, sample_seed
from megatron_ext.data.stream.plan import RunPlan
from megatron_ext.data.stream.position import Consumption, Position, SamplePlace
from megatron_ext.errors import DataError, EnvironmentFault

Batch = list[MicroBatch]
"""One rank's micro-batches of a global batch."""


class DataStream(Protocol):
    """Global batches in a fixed order; what comes next depends on the position alone."""

    def next(self) -> Batch:
        """This rank's micro-batches of the next global batch, on its device.

        Raises:
            DataError: the data was damaged, or there is none left.
        """

    def seek(self, position: Position) -> None:
        """Go to `position`, from where `next` reads on.

        Raises:
            DataError: `position` is none of this stream.
        """

    def position(self) -> Position:
        """What has been consumed: the batches that `next` gave out, not those that were read ahead."""

    def consumption(self) -> Consumption:
        """What `position` means for each source, exactly: it follows from the position, and is not counted beside."""

    def place(self, sample: int) -> SamplePlace:
        """Where a sample of the run comes from, wherever the stream stands."""

    def close(self) -> None:
        """End what reads ahead; `next` would begin anew from the same position."""


@dataclass(frozen=True)
class BatchShape:
    """How a global batch is cut over ranks and micro-batches."""

    global_batch: int
    """Samples of all ranks."""
    micro_batch: int
    """Samples of one forward pass."""
    dp_rank: int = 0
    dp_size: int = 1

    def at(self, position: int) -> "BatchShape":
        """The same at every position of a run."""
        return self

    @property
    def num_microbatches(self) -> int:
        """Micro-batches of one rank."""
        return self.global_batch // (self.micro_batch * self.dp_size)

    def rows(self, first_sample: int) -> list[list[int]]:
        """This rank's samples of the global batch that begins at `first_sample`, one list a micro-batch."""
        return sample_indices(first_sample, self.dp_rank, self.dp_size, self.micro_batch, self.num_microbatches)


class ShapeOfBatches(Protocol):
    """The shape of the global batch that begins at each position."""

    def at(self, position: int) -> BatchShape:
        """That of the batch whose first sample is number `position` of the run; at its end, that of the last."""


@dataclass(frozen=True)
class PlannedShapes:
    """Batches as the stages of a plan have them."""

    plan: RunPlan
    dp_rank: int = 0
    dp_size: int = 1

    def at(self, position: int) -> BatchShape:
        """See `ShapeOfBatches`."""
        stage = self.plan.stage_of_sample(min(position, self.plan.total_samples - 1))
        return BatchShape(stage.global_batch_size, stage.micro_batch_size, self.dp_rank, self.dp_size)


class Samples(Protocol):
    """Samples of several sources in one fixed order."""

    size: int
    num_sources: int

    def __getitem__(self, position: int) -> dict[str, Any]:
        """The sample at `position`: tokens, labels, loss_mask, and the number of its source."""

    def counts(self, first: int, last: int) -> Sequence[int]:
        """How many of the positions from `first` to before `last` are read from each source."""

    def stage(self, position: int) -> int:
        """Number of the stage that `position` belongs to."""

    def consumption(self, position: int, counts: Sequence[int]) -> Consumption:
        """What the samples before `position`, of which `counts` says how many each source has, are of each source."""

    def place(self, position: int) -> SamplePlace:
        """Where the sample at `position` comes from."""


class BlendStream:
    """Global batches of samples, read ahead by `num_workers` processes.

    Args:
        seed: of what is drawn for a sample (router noise).
        resets: what starts anew within a sample where a document ends.
    """

    def __init__(
        self,
        blend: Samples,
        shape: ShapeOfBatches,
        *,
        seed: int,
        device: torch.device,
        num_workers: int = 0,
        resets: DocumentResets | None = None,
    ) -> None:
        self._blend, self._shape, self._device = blend, shape, device
        self._read_ahead: Iterator[MicroBatch] | None = None
        self._at, self._counts = 0, [0] * blend.num_sources
        self._loader = partial(
            torch.utils.data.DataLoader,
            _Seeded(blend, seed),
            collate_fn=partial(collate, resets=resets),
            num_workers=num_workers,
            pin_memory=device.type == "cuda",
            worker_init_fn=_leave_signals_to_training,
        )

    def next(self) -> Batch:
        """See `DataStream.next`."""
        shape = self._shape.at(self._at)
        after = self._at + shape.global_batch
        if after > self._blend.size:
            raise DataError(f"the stream was opened for {self._blend.size} samples, and sample {after - 1} is wanted")
        if self._read_ahead is None:
            # A generator of its own: it would draw the seed of its processes from the one that dropout goes on with.
            plan = _plan(self._shape, self._at, self._blend.size)
            self._read_ahead = iter(self._loader(batch_sampler=plan, generator=torch.Generator()))
        try:
            with _faults_as_here():
                micro_batches = [next(self._read_ahead) for _ in range(shape.num_microbatches)]
        except BaseException:
            self.close()
            raise
        self._count(after)
        return [micro.to(self._device) for micro in micro_batches]

    def seek(self, position: Position) -> None:
        """See `DataStream.seek`."""
        if position.samples > self._blend.size:
            raise DataError(
                f"sample {position.samples} is beyond the {self._blend.size} that the stream was opened for"
            )
        counts = tuple(self._blend.counts(0, position.samples))
        stage = self._blend.stage(position.samples)
        if (position.sources or position.stage) and (position.stage, position.sources) != (stage, counts):
            raise DataError(
                f"the checkpoint says that of {position.samples} samples {list(position.sources)} were read from the "
                f"sources of data.train, stage {position.stage}; the sources of this run would have given "
                f"{list(counts)}, stage {stage}: state.json or data.train was changed; tools/verify_checkpoint.py tells"
            )
        self.close()
        self._at, self._counts = position.samples, list(counts)

    def position(self) -> Position:
        """See `DataStream.position`."""
        return Position(self._at, self._blend.stage(self._at), tuple(self._counts))

    def consumption(self) -> Consumption:
        """See `DataStream.consumption`."""
        return self._blend.consumption(self._at, self._counts)

    def place(self, sample: int) -> SamplePlace:
        """See `DataStream.place`."""
        return self._blend.place(sample)

    def close(self) -> None:
        """See `DataStream.close`."""
        # Forgetting the iterator is not enough: the traceback of an error may know it too. Its processes ignore the
        # signal that would end them with this one, which then waits for them for ever.
        read_ahead, self._read_ahead = self._read_ahead, None
        if (end_processes := getattr(read_ahead, "_shutdown_workers", None)) is not None:
            end_processes()

    def _count(self, after: int) -> None:
        self._counts = [a + b for a, b in zip(self._counts, self._blend.counts(self._at, after), strict=True)]
        self._at = after


def _plan(shapes: ShapeOfBatches, first: int, size: int) -> Iterator[list[int]]:
    """The rows of each micro-batch of this rank, from sample `first` on, for as long as there are whole batches."""
    while first < size and first + (shape := shapes.at(first)).global_batch <= size:
        yield from shape.rows(first)
        first += shape.global_batch


class _Seeded(torch.utils.data.Dataset[dict[str, Any]]):
    """A blend whose samples carry the seed of their position."""

    def __init__(self, blend: Samples, seed: int) -> None:
        self.blend, self.seed = blend, seed

    def __getitem__(self, position: int) -> dict[str, Any]:
        return {**self.blend[position], "seed": sample_seed(self.seed, position)}


def _leave_signals_to_training(worker: int) -> None:
    """Signals to a whole job ask training to stop, which needs its workers until it has; they end with it."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def _faults_as_here() -> Iterator[None]:
    """Say what goes wrong in a process that reads ahead as if it were this one."""
    try:
        yield
    except DataError as error:
        # torch puts the traceback of the other process into the message; ours is its end.
        raise DataError(str(error).rpartition("DataError: ")[2].strip()) from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        why = str(error).strip().splitlines()[0]
        way_out = "does memory, or shared memory (/dev/shm), run out? A lower data.num_workers needs less"
        raise EnvironmentFault(f"a process that reads data ahead ended ({why}); {way_out}") from error
