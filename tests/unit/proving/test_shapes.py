"""The shapes of a proof: as few samples and tokens as its layout can split, and the pipeline full."""

import pytest

from megatron_ext.config import ParallelConfig
from megatron_ext.planning.proven import is_proven
from megatron_ext.proving.parity import Shape
from megatron_ext.proving.prove import plan_proof
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


def test_what_a_cpu_cannot_compute_is_said_to_be_unproven() -> None:
    run = load(
        mapping(
            precision={"kind": "bf16"},
            optimizer={"kind": "adam", "lr": 1e-3, "exp_avg_dtype": "bf16", "moments_on_host": True},
            runtime={"kernels": "triton", "compile_router": True},
            model={"num_moe_experts": 8},
            recompute={"offload_layers": 3},
        )
    )
    plan = plan_proof(run, 2, 2)
    keys = ["precision.kind: bf16", "runtime.kernels: triton", "runtime.compile_router: true"]
    keys += ["optimizer.exp_avg_dtype: bf16", "optimizer.moments_on_host: true", "recompute.offload_layers: 3"]
    assert [said.partition(";")[0] for said in plan.unproven] == keys
    # What is moved is proven, however small it is here.
    assert (plan.cell.recompute.offload_layers, plan.cell.recompute.offload_min_bytes) == (3, 1)
    experts = {"num_moe_experts": 8}
    engine = {"backend": "transformer_engine"}
    again = {"granularity": "selective", "modules": ["moe_act"]}
    plan = plan_proof(load(mapping(model=experts, runtime=engine, recompute=again)), 2, 2)
    assert [said.partition(";")[0] for said in plan.unproven] == [
        "runtime.backend: transformer_engine",
        "recompute.modules: moe_act",
    ]
    assert plan_proof(load(mapping()), 2, 2).unproven == ()


def test_tokens_travel_as_they_can_without_a_gpu() -> None:
    shared = {"num_moe_experts": 8, "moe_shared_expert_intermediate_size": 8}
    flex = {"moe_token_dispatcher_type": "flex", "expert_model_parallel_size": 2}
    run = load(mapping(model=shared, parallel=flex, precision={"kind": "bf16"}))
    plan = plan_proof(run, 2, 2)
    assert plan.cell.parallel.moe_token_dispatcher_type == "alltoall"
    assert any("flex -> alltoall; deepep needs GPUs, and what it sends is unproven here" in c for c in plan.changes)
    assert not is_proven(run, run.resolve(2))
    overlapped = {"moe_shared_expert_overlap": True, "expert_model_parallel_size": 2}
    run = load(mapping(model=shared, parallel=overlapped))
    assert plan_proof(run, 2, 2).cell.parallel.moe_shared_expert_overlap
    assert "parallel.moe_shared_expert_overlap: True -> False" in plan_proof(run, 2, 1).changes
    # The proof is of the run as it is on CUDA.
    assert plan_proof(run, 2, 2).cell.parallel.overlap_param_gather
