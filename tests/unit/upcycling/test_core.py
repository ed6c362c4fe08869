"""megatron-core's own upcycling beside ours: equal where it keeps the function, and where it does not."""

from typing import Any

import pytest
import torch
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer.moe.upcycling_utils import upcycle_state_dict
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor

from megatron_ext.config import Fp32Precision, ModelConfig, ParallelConfig, RecomputeConfig, RuntimeConfig
from megatron_ext.mcore.transformer_config import transformer_config
from megatron_ext.runtime.process_groups import split_process_group
from megatron_ext.runtime.seeds import seed_everything
from megatron_ext.testing.pool import GlooPool
from megatron_ext.upcycling.feed_forward import FeedForward
from megatron_ext.upcycling.methods.base import Method
from megatron_ext.upcycling.methods.copy import Copy
from megatron_ext.upcycling.methods.fine_grained import FineGrained
from tests.unit.upcycling.one_layer import EXACT, NAMES, model, moe_output, network, output, tokens, upcycled


def core_config(moe: ModelConfig) -> Any:
    """What megatron-core's own layers read of `moe`."""
    config = transformer_config(moe, ParallelConfig(), Fp32Precision(kind="fp32"), RecomputeConfig())
    config.moe_grouped_gemm = False
    config.moe_router_pre_softmax = moe.moe_router_pre_softmax
    return config


def as_layer(mlp: torch.nn.Module) -> torch.nn.Module:
    return torch.nn.ModuleDict({"mlp": mlp})


def by_core(moe: ModelConfig, source: FeedForward) -> dict[str, Tensor]:
    """The tensors that megatron-core makes of `source`, under our names."""
    split_process_group(ParallelConfig(), RuntimeConfig(device="cpu"))
    seed_everything(0)
    config = core_config(moe)
    # Of the dense layer it reads no more than this.
    dense_mlp = torch.nn.ModuleDict({name: torch.nn.Linear(1, 1, bias=False) for name in ("linear_fc1", "linear_fc2")})
    dense_mlp.config = config
    dense_mlp["linear_fc1"].weight = torch.nn.Parameter(source.fc1)
    dense_mlp["linear_fc2"].weight = torch.nn.Parameter(source.fc2)
    spec = get_moe_module_spec(use_te=False, num_experts=moe.num_moe_experts, moe_grouped_gemm=False)
    moe_layer = _built(spec, config)
    with torch.no_grad():
        moe_layer.router.weight.normal_()
    made = upcycle_state_dict([as_layer(moe_layer)], [as_layer(dense_mlp)])["model"]
    experts = {
        f"mlp.experts.{e}.{NAMES[part]}": made[f"mlp.experts.local_experts.{e}.{NAMES[part]}"]
        for e in range(moe.num_moe_experts or 0)
        for part in ("fc1", "fc2")
    }
    return {"mlp.router.weight": made["mlp.router.weight"].detach(), **experts}


def _built(spec: Any, config: Any) -> Any:
    """0.16 has specs to build from, 0.19 has callables."""
    return build_module(spec, config=config) if hasattr(spec, "module") else spec(config=config)


def distance(tensors: dict[str, Tensor], moe: ModelConfig, source: FeedForward) -> float:
    expected = output(source, tokens())
    return float((moe_output(tensors, moe, tokens()) - expected).abs().max() / expected.abs().max())


def both(method: Method, changes: dict[str, Any]) -> tuple[float, float, bool]:
    """Distance to the dense layer of megatron-core's result and of ours, and whether their experts are equal."""
    source, moe = network(), model(method, **changes)
    # It scales weights: for it no factor of the router's, and no division by the sum.
    core_changes = {**changes, "moe_router_norm_topk_prob": None, "moe_ffn_hidden_size": moe.expert_ffn_hidden_size}
    core_model = model(Copy(), **core_changes)
    theirs, ours = by_core(core_model, source), upcycled(method, moe, [source])
    same = all(torch.equal(theirs[name], ours[name]) for name in ours if "experts" in name)
    return distance(theirs, core_model, source), distance(ours, moe, source), same


def test_copies_are_megatron_cores(pool: GlooPool) -> None:
    ((theirs, ours, same),) = pool.run(1, both, Copy(), {})
    print(f"megatron-core {theirs:.1e}, ours {ours:.1e} of the output's scale")
    assert max(theirs, ours) < EXACT
    assert same


@pytest.mark.parametrize("pre_softmax", [False, True])
def test_megatron_core_does_not_keep_the_function_of_fine_grained_experts(pre_softmax: bool, pool: GlooPool) -> None:
    """It scales the gate too, and SiLU(s x) is not s SiLU(x)."""
    changes = {"moe_router_pre_softmax": pre_softmax, "moe_router_norm_topk_prob": True if pre_softmax else None}
    ((theirs, ours, _),) = pool.run(1, both, FineGrained(granularity=2), changes)
    print(f"megatron-core {theirs:.1e}, ours {ours:.1e} of the output's scale")
    assert theirs > 1e-3
    assert ours < EXACT
