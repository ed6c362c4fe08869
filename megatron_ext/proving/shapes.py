"""The shapes of a run's steps made small for a proof: what is longer, larger or other than before stays so."""

from collections.abc import Sequence

from megatron_ext.config import ParallelConfig, RunConfig
from megatron_ext.config.layout import StepShape
from megatron_ext.proving.parity import Shape


def shrink_shapes(run: RunConfig, parallel: ParallelConfig, data_ranks: int) -> tuple[list[Shape], list[str]]:
    """Each different shape of the steps of `run` once, in order, and what names it.

    Lengths and global batches keep their order: the shortest is the least that the layout can split, the next twice
    that, and so on.

    Args:
        parallel: the layout of the proof.
        data_ranks: its data-parallel ranks.
    """
    ways = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    # Enough micro-batches for the pipeline to be full once, and a number that the interleaved schedule takes.
    micro_batches = 2 * parallel.pipeline_model_parallel_size
    shapes = run.step_shapes
    lengths, batches = _ranks([s.length for s in shapes]), _ranks([s.size / s.micro_size for s in shapes])
    found: dict[Shape, str] = {}
    for shape in shapes:
        rows = min(shape.micro_size, 2)
        samples = data_ranks * rows * micro_batches * batches[shape.size / shape.micro_size]
        # The sequence too: each rank has some tokens, under sequence and context parallelism alike.
        small = Shape(samples, rows, 16 * ways * lengths[shape.length], shape.rotary_base)
        found.setdefault(small, _name(shape))
    return list(found), list(found.values())


def _ranks(values: Sequence[float]) -> dict[float, int]:
    """1 for the smallest of different values, 2 for the next, and so on."""
    return {value: number for number, value in enumerate(sorted(set(values)), start=1)}


def _name(shape: StepShape) -> str:
    return f"{shape.stage or 'the run'}: {shape.size} x {shape.length}, rotary base {shape.rotary_base:g}"
