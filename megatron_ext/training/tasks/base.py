"""What a training step asks of a task: which loss of which outputs, and what it is divided by."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from megatron_ext.data.stream.batches import MicroBatch


class TrainTask(Protocol):
    """A task says what is computed of a micro-batch; the step sums it over micro-batches, ranks and pipeline stages.

    Micro-batches come as this rank's share: under context parallelism some of the tokens of each sample.
    """

    @property
    def sums(self) -> tuple[str, ...]:
        """The names of all sums that `loss` can return; the first, `loss`, is the one by which a run is judged."""

    @property
    def has_perplexity(self) -> bool:
        """Whether the loss is a mean cross-entropy, of which the exponential is a perplexity."""

    def prepare(
        self, wrapped: Sequence[Any], batch: Sequence[MicroBatch], *, rows: int, length: int
    ) -> list[MicroBatch]:
        """This rank's share of a global batch with all that `loss` needs, before the step; every rank calls this.

        Args:
            wrapped: this rank's model chunks; their state stays as it is.
            rows: samples of a micro-batch.
            length: tokens of a whole sample.
        """

    def forward(self, model: Any, micro: MicroBatch) -> Tensor:
        """The output of a model chunk for `micro`: on the last pipeline stage what `loss` takes."""

    def loss(self, output: Tensor, micro: MicroBatch) -> Mapping[str, Tensor]:
        """Sums over each sample of `micro`, by name: [B] in fp32. One that is left out counts as zero.

        Those that carry a gradient are minimised together, each divided by the units of the global batch; detached
        ones are only reported. The first, `loss`, is also reported for each source of the data.
        """

    def units(self, micro: MicroBatch) -> Tensor:
        """How many units (tokens, pairs) of each sample count, [B]: what the sums of a global batch are divided by."""
