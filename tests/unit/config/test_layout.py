"""The rank grid: its sizes, its refusals, and megatron-core's own groups."""

import pytest
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ext.config import ParallelConfig, Position, RuntimeConfig, TrainConfig
from megatron_ext.config.layout import Layout, resolve_layout, smallest_world_size
from megatron_ext.errors import ConfigError
from megatron_ext.runtime.process_groups import split_process_group
from megatron_ext.testing.pool import GlooPool
from tests.support.minimal_run import load, mapping

GRIDS = [
    ParallelConfig(),
    ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2),
    ParallelConfig(
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        expert_model_parallel_size=2,
        expert_tensor_parallel_size=1,
    ),
    ParallelConfig(
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        expert_model_parallel_size=4,
        expert_tensor_parallel_size=1,
        pipeline_model_parallel_size=2,
    ),
    ParallelConfig(expert_model_parallel_size=4, pipeline_model_parallel_size=2),
    ParallelConfig(
        tensor_model_parallel_size=2, sequence_parallel=True, context_parallel_size=2, expert_model_parallel_size=2
    ),
    ParallelConfig(context_parallel_size=2, expert_model_parallel_size=2, pipeline_model_parallel_size=2),
]
TRAIN = TrainConfig(train_iters=1, global_batch_size=32, micro_batch_size=2)


def core_position(parallel: ParallelConfig) -> Position:
    split_process_group(parallel, RuntimeConfig(device="cpu"))
    return Position(
        rank=dist.get_rank(),
        tp=parallel_state.get_tensor_model_parallel_rank(),
        cp=parallel_state.get_context_parallel_rank(),
        dp=parallel_state.get_data_parallel_rank(),
        pp=parallel_state.get_pipeline_model_parallel_rank(),
        etp=parallel_state.get_expert_tensor_parallel_rank(),
        ep=parallel_state.get_expert_model_parallel_rank(),
        edp=parallel_state.get_expert_data_parallel_rank(),
    )


@pytest.mark.parametrize("parallel", GRIDS, ids=range(len(GRIDS)))
def test_positions_are_those_of_megatron_core(parallel: ParallelConfig, pool: GlooPool) -> None:
    layout = resolve_layout(parallel, TRAIN, 8)
    assert pool.run(8, core_position, parallel) == [layout.position(rank) for rank in range(8)]


def test_sizes() -> None:
    layout = resolve_layout(GRIDS[3], TRAIN, 16)
    assert layout == Layout(world_size=16, tp=2, cp=1, dp=4, pp=2, etp=1, ep=4, edp=2, num_microbatches=4)
    assert smallest_world_size(GRIDS[3]) == 8
    layout = resolve_layout(GRIDS[5], TRAIN, 16)
    assert layout == Layout(world_size=16, tp=2, cp=2, dp=4, pp=1, etp=2, ep=2, edp=4, num_microbatches=4)
    assert smallest_world_size(GRIDS[5]) == 4


@pytest.mark.parametrize(
    ("parallel", "world_size", "expected"),
    [
        (GRIDS[1], 6, "6 processes cannot be split into tensor_model_parallel_size = 2"),
        (GRIDS[2], 3, "start a multiple of 2"),
        (GRIDS[4], 4, "cannot hold experts split over"),
        (GRIDS[5], 6, "context_parallel_size = 2 x pipeline_model_parallel_size = 1; start a multiple of 4"),
        (ParallelConfig(), 5, "train.global_batch_size = 32 is not a multiple"),
        (
            ParallelConfig(pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=2),
            32,
            "multiples of pipeline_model_parallel_size = 4",
        ),
    ],
)
def test_impossible_grids_are_refused(parallel: ParallelConfig, world_size: int, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        resolve_layout(parallel, TRAIN, world_size)


def test_batches_of_every_stage_and_of_the_ramp_are_split_too() -> None:
    raw = mapping(
        train={"global_batch_size": 8, "train_iters": 0, "batch_size_ramp": [{"global_batch_size": 6, "steps": 1}]},
        parallel={"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    )
    raw["data"] |= {"train": [], "cache_dir": None, "sources": {"a": {"path": "a"}}}
    stage = {"mix": {"a": 1.0}, "steps": 2}
    raw["data"]["stages"] = [
        {"name": "one", **stage},
        {"name": "two", **stage, "global_batch_size": 10, "sequence_length": 32},
        {"name": "three", **stage, "micro_batch_size": 4},
    ]
    run = load(raw)
    assert run.resolve(2).num_microbatches == 8
    with pytest.raises(ConfigError) as caught:
        run.resolve(8)
    said = str(caught.value).splitlines()
    expected = (
        ("train.batch_size_ramp.0.global_batch_size = 6", "train.micro_batch_size = 1 x 4", "(stage one)"),
        ("(1 = train.batch_size_ramp.0.global_batch_size / micro_batch_size / 4)", "(stage one)"),
        ("data.stages.1.global_batch_size = 10", "train.micro_batch_size = 1 x 4", "(stage two)"),
        ("train.global_batch_size = 8", "data.stages.2.micro_batch_size = 4 x 4", "(stage three)"),
    )
    assert len(said) == len(expected)
    assert all(part in line for line, parts in zip(said, expected, strict=True) for part in parts)
    assert run.step_tokens == {6 * 64, 8 * 64, 10 * 32}


@pytest.mark.parametrize(
    ("said", "on_cuda", "copies", "settled"),
    [
        ({}, True, 2, (True, True)),
        ({}, True, 1, (False, False)),
        ({}, False, 2, (False, False)),
        ({"use_distributed_optimizer": False}, True, 2, (True, False)),
        ({"overlap_grad_reduce": False}, True, 2, (False, False)),
        ({"overlap_param_gather": False}, True, 2, (True, False)),
        ({"overlap_grad_reduce": True}, False, 1, (True, False)),
        ({"overlap_param_gather": True}, False, 2, (True, True)),
    ],
)
def test_messages_overlap_on_cuda_unless_said_otherwise(
    said: dict[str, bool], on_cuda: bool, copies: int, settled: tuple[bool, bool]
) -> None:
    parallel = ParallelConfig(**said).settled(on_cuda=on_cuda, copies=copies)
    assert (parallel.overlap_grad_reduce, parallel.overlap_param_gather) == settled
    assert parallel.settled(on_cuda=not on_cuda, copies=3 - copies) == parallel
