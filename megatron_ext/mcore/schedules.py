"""Runs megatron-core's pipeline schedule (none, 1F1B or interleaved, as the layout asks) over micro-batches."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

T = TypeVar("T")


def run_schedule(
    wrapped: Sequence[Any],
    forward: Callable[[Iterator[T], Any], tuple[Tensor, Any]],
    batch: Sequence[T],
    *,
    rows: int,
    length: int,
    forward_only: bool,
) -> list[Tensor]:
    """Forward and, unless `forward_only`, backward over all micro-batches; gradients are left in the chunks' buffers.

    Args:
        wrapped: this rank's model chunks, wrapped for data parallelism; several under virtual pipeline stages.
        forward: takes the iterator over micro-batches and a chunk; returns the chunk's output and a function that
            makes of the last stage's output the loss to minimise and what is reported of it.
        batch: this rank's micro-batches, each to be read by every chunk.
        rows: samples of a micro-batch.
        length: tokens of a whole sample: the schedule itself takes a context-parallel rank's share.

    Returns:
        What was reported of each micro-batch; nothing on any but the last pipeline stage.
    """
    iterators = [iter(batch) for _ in wrapped]
    reported: list[Tensor] = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iterators if len(wrapped) > 1 else iterators[0],
        model=list(wrapped) if len(wrapped) > 1 else wrapped[0],
        num_microbatches=len(batch),
        seq_length=length,
        micro_batch_size=rows,
        forward_only=forward_only,
    )
    return reported
