"""Where a data stream stands: what has been consumed, in all and of each source."""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_ext.data.stream.plan import Consumed


@dataclass(frozen=True)
class Position:
    """The number of samples consumed is the position; the counts of the sources follow from it and are checked."""

    samples: int = 0
    """Samples consumed since the run began: the number of the one that comes next."""
    stage: int = 0
    """Number of the data stage that the next sample belongs to."""
    sources: tuple[int, ...] = ()
    """Samples consumed of each source of that stage; empty where only `samples` is known, as in old checkpoints."""

    def __post_init__(self) -> None:
        counts = (self.samples, self.stage, *self.sources)
        if any(type(count) is not int or count < 0 for count in counts):
            raise ValueError(f"{self} is no position: counts are no less than 0")

    def after(self, samples: int) -> "Position":
        """The position `samples` later; a stream that goes there counts stage and sources anew."""
        return Position(self.samples + samples)


@dataclass(frozen=True)
class SamplePlace:
    """Where a sample comes from."""

    source: str
    """Id of its source."""
    number: int
    """Samples of that source before it, over all epochs."""
    epoch: int
    """From 0."""
    where: str
    """Where it stands in the files of the source; for people."""


@dataclass(frozen=True)
class Consumption:
    """What was consumed until a position."""

    sources: Mapping[str, Consumed]
    """By id, in the order in which samples number their sources."""
    stage: str | None = None
    """Name of the stage of the data that was read last; None where there is only one."""
