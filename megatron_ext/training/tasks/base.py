"""What a training step asks of a task: which loss of which outputs, and what it is divided by."""

from collections.abc import Mapping
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
    def needs_reference(self) -> bool:
        """Whether `forward` compares with a frozen model, which is built beside the trained one."""

    def forward(self, model: Any, micro: MicroBatch) -> Tensor:
        """The output of a model chunk for `micro`: on the last pipeline stage what `loss` takes."""

    def loss(self, output: Tensor, micro: MicroBatch) -> Mapping[str, Tensor]:
        """Sums over each sample of `micro`, by name: [B] in fp32. One that is left out counts as zero.

        Those that carry a gradient are minimised together, each divided by the units of the global batch; detached
        ones are only reported. The first, `loss`, is also reported for each source of the data.
        """

    def units(self, micro: MicroBatch) -> Tensor:
        """How many units (tokens, pairs) of each sample count, [B]: what the sums of a global batch are divided by."""
