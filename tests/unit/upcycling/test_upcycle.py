"""Upcycling a dense checkpoint: what is copied, what is drawn, and that the function is kept, measured on logits."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.checkpoint.shapes import model_shapes
from megatron_ext.checkpoint.tensors import MegatronSource
from megatron_ext.config import LearnedNoise, ModelConfig
from megatron_ext.conversion.checkpoint_model import read_model
from megatron_ext.conversion.text import comparison_batches
from megatron_ext.errors import ConfigError, ConversionError
from megatron_ext.testing.pool import GlooPool
from megatron_ext.testing.tiny import tiny_model
from megatron_ext.upcycling import check
from megatron_ext.upcycling.copy import Copy
from megatron_ext.upcycling.upcycle import upcycle
from tests.unit.conversion.test_convert import write_checkpoint

DENSE = tiny_model()


def moe_model(**changes: object) -> ModelConfig:
    moe = tiny_model(moe=True, moe_ffn_hidden_size=DENSE.ffn_hidden_size, moe_shared_expert_intermediate_size=40)
    return replace(moe, **changes)


def measured(source: Path, target: Path, moe: ModelConfig) -> float:
    batches = comparison_batches(source, None, None, batches=2, length=32)
    return check.function_check(source, target, moe, Copy(), batches).relative


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("dense"), DENSE)


ROUTERS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "sigmoid": {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
    "normalized, gated, noisy, capacity": {
        "moe_router_pre_softmax": True,
        "moe_router_norm_topk_prob": True,
        "moe_shared_expert_gate": True,
        "moe_router_noise": LearnedNoise(kind="learned"),
        "moe_expert_capacity_factor": 0.5,
    },
}


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_function_is_kept_whatever_the_router_says(
    seed: int, router: str, dense: Path, tmp_path: Path, pool: GlooPool
) -> None:
    moe = moe_model(init_method_std=1.0, **ROUTERS[router])
    upcycle(dense, tmp_path / "moe", moe, Copy(), seed=seed)
    relative = pool.run(1, measured_in_worker, dense, tmp_path / "moe", moe)[0]
    print(f"{router}, seed {seed}: largest difference of the logits {relative:.1e} of their scale")
    assert relative <= check.TOLERANCE


def measured_in_worker(source: Path, target: Path, moe: ModelConfig) -> float:
    """`measured` in a process that starts its own process group."""
    from megatron_ext.runtime.process_groups import end_process_groups

    end_process_groups()
    return measured(source, target, moe)


@pytest.mark.parametrize("gated", [False, True])
def test_biases_and_other_activations_are_carried(gated: bool, tmp_path: Path, pool: GlooPool) -> None:
    features = {
        "position_embedding_type": "learned_absolute",
        "normalization": "LayerNorm",
        "activation_func": "gelu_tanh",
        "gated_linear_unit": gated,
        "add_bias_linear": True,
    }
    moe = moe_model(**features, init_method_std=1.0)
    source = write_checkpoint(tmp_path / "dense", replace(DENSE, **features))
    upcycle(source, tmp_path / "moe", moe, Copy(), seed=1)
    relative = pool.run(1, measured_in_worker, source, tmp_path / "moe", moe)[0]
    print(f"gated {gated}: largest difference of the logits {relative:.1e} of their scale")
    assert relative <= check.TOLERANCE
    after = MegatronSource(tmp_path / "moe")
    shared = "decoder.layers.1.mlp.shared_experts"
    assert not after.read(f"{shared}.linear_fc2.bias").any()
    assert after.read(f"{shared}.linear_fc1.bias").any()
    expert, dense_bias = "decoder.layers.1.mlp.experts.3.linear_fc1.bias", "decoder.layers.1.mlp.linear_fc1.bias"
    assert torch.equal(after.read(expert), MegatronSource(source).read(dense_bias))


def test_experts_are_the_dense_layer_and_the_shared_expert_is_silent(dense: Path, tmp_path: Path) -> None:
    moe = moe_model(moe_shared_expert_intermediate_size=120)
    upcycle(dense, tmp_path / "moe", moe, Copy(), seed=0)
    before, after = MegatronSource(dense), MegatronSource(tmp_path / "moe")
    assert {name: spec.shape for name, spec in after.specs.items()} == model_shapes(moe)
    assert read_model(tmp_path / "moe") == moe
    for name in before.specs:
        if ".mlp.linear_fc" not in name or "layers.0." in name:
            assert torch.equal(before.read(name), after.read(name)), name
    for layer in (1, 2, 3):
        prefix = f"decoder.layers.{layer}.mlp"
        for matrix in ("linear_fc1.weight", "linear_fc2.weight"):
            ffn = before.read(f"{prefix}.{matrix}")
            assert all(torch.equal(after.read(f"{prefix}.experts.{e}.{matrix}"), ffn) for e in range(4))
        assert not after.read(f"{prefix}.shared_experts.linear_fc2.weight").any()
        gate, up = after.read(f"{prefix}.shared_experts.linear_fc1.weight").chunk(2)
        dense_gate, dense_up = before.read(f"{prefix}.linear_fc1.weight").chunk(2)
        assert torch.equal(gate, torch.cat((dense_gate, dense_gate[:24])))
        assert torch.equal(up, torch.cat((dense_up, dense_up[:24])))


def test_routers_follow_the_seed_alone(dense: Path, tmp_path: Path) -> None:
    names = ["decoder.layers.1.mlp.router.weight", "decoder.layers.2.mlp.router.weight"]

    def routers(target: str, seed: int, moe: ModelConfig) -> list[torch.Tensor]:
        upcycle(dense, tmp_path / target, moe, Copy(), seed=seed)
        source = MegatronSource(tmp_path / target)
        return [source.read(name) for name in names]

    first = routers("a", 1, moe_model())
    again = routers("b", 1, moe_model(moe_shared_expert_intermediate_size=None))
    other = routers("c", 2, moe_model())
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], first[1])
    assert float(first[0].std()) == pytest.approx(moe_model().init_method_std, rel=0.2)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"moe_router_pre_softmax": True}, "do not sum to 1"),
        ({"moe_router_topk_scaling_factor": 2.0}, "sum to that"),
        ({}, None),
        ({"moe_router_topk_scaling_factor": 1.0}, None),
    ],
)
def test_a_method_says_when_the_function_changes(changes: dict[str, object], reason: str | None) -> None:
    stated = Copy().inexact(moe_model(**changes))
    assert stated == reason if reason is None else reason in str(stated)


def test_a_changed_function_is_an_error_where_it_should_be_kept(dense: Path, tmp_path: Path, pool: GlooPool) -> None:
    """The check can fail: a model with another scaling factor, passed off as one without."""
    scaled = moe_model(moe_router_topk_scaling_factor=2.0)
    upcycle(dense, tmp_path / "moe", scaled, Copy(), seed=0)
    assert pool.run(1, measured_in_worker, dense, tmp_path / "moe", scaled)[0] > 100 * check.TOLERANCE
    assert "does not compute what" in pool.run(1, complaint_in_worker, dense, tmp_path / "moe", moe_model())[0]
    assert [path.name for path in (tmp_path / "moe").glob("iter_*")] == ["iter_0000000.refused"]


def complaint_in_worker(source: Path, target: Path, moe: ModelConfig) -> str:
    try:
        measured_in_worker(source, target, moe)
    except ConversionError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"moe_ffn_hidden_size": 48}, "moe_ffn_hidden_size = 48: copying needs experts of the dense layer's width, 96"),
        ({"moe_router_topk": 9}, "model.moe_router_topk = 9, model.num_moe_experts = 4"),
        ({"moe_router_topk": 1}, "set moe_router_pre_softmax: true"),
        ({"hidden_size": 128}, "hidden_size: 64 in the source, 128 in the target"),
        ({"rotary_base": 5e5}, "rotary_base: 10000.0 in the source, 500000.0 in the target"),
    ],
)
def test_a_model_that_cannot_be_made_is_refused_and_nothing_is_written(
    changes: dict[str, object], complaint: str, dense: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as error:
        upcycle(dense, tmp_path / "moe", moe_model(**changes), Copy(), seed=0)
    assert complaint in str(error.value)
    assert not (tmp_path / "moe").exists()


def test_a_moe_source_and_a_dense_target_are_refused(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the target has no experts"):
        upcycle(dense, tmp_path / "x", DENSE, Copy(), seed=0)
    upcycle(dense, tmp_path / "moe", moe_model(), Copy(), seed=0)
    with pytest.raises(ConfigError, match="the source is a MoE model already"):
        upcycle(tmp_path / "moe", tmp_path / "x", moe_model(), Copy(), seed=0)


def test_an_existing_target_is_kept_unless_forced(dense: Path, tmp_path: Path) -> None:
    upcycle(dense, tmp_path / "moe", moe_model(), Copy(), seed=1)
    with pytest.raises(ConversionError, match="not empty"):
        upcycle(dense, tmp_path / "moe", moe_model(), Copy(), seed=2)
    upcycle(dense, tmp_path / "moe", moe_model(), Copy(), seed=2, force=True)
