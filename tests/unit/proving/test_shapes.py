"""The shapes of a proof: as few samples and tokens as its layout can split, and the pipeline full."""

import pytest

from megatron_ext.config import ParallelConfig
from megatron_ext.proving.parity import Shape
from megatron_ext.proving.shapes import shrink_shapes
from tests.support.minimal_run import load, mapping


@pytest.mark.parametrize(
    ("parallel", "data_ranks", "shape"),
    [
        # samples: ranks x rows x micro-batches; tokens: 16 a tensor and context rank
        ({}, 1, Shape(2 * 2, 2, 16, 1e4)),
        ({"tensor_model_parallel_size": 2, "context_parallel_size": 2}, 3, Shape(3 * 2 * 2, 2, 64, 1e4)),
        ({"pipeline_model_parallel_size": 4}, 2, Shape(2 * 2 * 8, 2, 16, 1e4)),
    ],
    ids=["one process", "split within layers", "pipeline"],
)
def test_a_step_is_as_small_as_its_layout_lets_it_be(parallel: dict[str, int], data_ranks: int, shape: Shape) -> None:
    run = load(mapping(train={"global_batch_size": 64, "micro_batch_size": 4}, data={"sequence_length": 4096}))
    assert shrink_shapes(run, ParallelConfig(**parallel), data_ranks) == (
        [shape],
        ["the run: 64 x 4096, rotary base 10000"],
    )


def test_stages_keep_their_order_of_lengths_and_batches_and_each_shape_comes_once() -> None:
    stage = {"mix": {"a": 1.0}, "steps": 9}
    stages = [
        {"name": "short", **stage},
        {"name": "long", **stage, "sequence_length": 256, "rotary_base": 5e5},
        {"name": "wide", **stage, "global_batch_size": 24},
        {"name": "short again", **stage},
    ]
    data = {"train": [], "cache_dir": None, "sources": {"a": {"path": "a"}}, "stages": stages}
    run = load(mapping(data=data, train={"train_iters": 0}))
    small, large = 2 * 2, 2 * 2 * 2  # one row: two data ranks, two micro-batches
    assert shrink_shapes(run, ParallelConfig(), 2) == (
        [Shape(small, 1, 16, 1e4), Shape(small, 1, 32, 5e5), Shape(large, 1, 16, 1e4)],
        [
            "short: 8 x 64, rotary base 10000",
            "long: 8 x 256, rotary base 500000",
            "wide: 24 x 64, rotary base 10000",
        ],
    )
