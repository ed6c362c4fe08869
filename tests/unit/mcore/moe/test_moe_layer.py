"""A whole MoE layer, routed and shared experts together, against transformers' with the same weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV2Config, DeepseekV3Config, Qwen2MoeConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from megatron_ext.config import (
    Bf16Precision,
    Fp32Precision,
    ModelConfig,
    ParallelConfig,
    RecomputeConfig,
    RuntimeConfig,
)
from megatron_ext.mcore.model import build_chunks
from megatron_ext.mcore.transformer_config import transformer_config
from megatron_ext.runtime.process_groups import split_process_group
from megatron_ext.runtime.seeds import seed_everything
from megatron_ext.testing.pool import GlooPool
from megatron_ext.testing.tiny import tiny_model

HIDDEN, EXPERTS, WIDTH = 64, 8, 24
PRECISIONS = {torch.float32: Fp32Precision(kind="fp32"), torch.bfloat16: Bf16Precision(kind="bf16")}
SIZES = {"hidden_size": HIDDEN, "moe_intermediate_size": WIDTH, "num_experts_per_tok": 3, "num_attention_heads": 4}
GROUPS = {"n_routed_experts": EXPERTS, "n_group": 4, "topk_group": 2, "n_shared_experts": 2}
OUR_GROUPS = {"moe_router_num_groups": 4, "moe_router_group_topk": 2}


def moe(**fields: Any) -> ModelConfig:
    return tiny_model(
        moe=True,
        num_layers=1,
        moe_first_k_dense=0,
        num_moe_experts=EXPERTS,
        moe_ffn_hidden_size=WIDTH,
        moe_router_topk=3,
        moe_gating_normalization=None,
        moe_aux_loss_coeff=0.0,
        **fields,
    )


def qwen2() -> tuple[torch.nn.Module, str, ModelConfig]:
    config = Qwen2MoeConfig(**SIZES, num_experts=EXPERTS, shared_expert_intermediate_size=40)
    ours = moe(moe_router_pre_softmax=True, moe_shared_expert_intermediate_size=40, moe_shared_expert_gate=True)
    return Qwen2MoeSparseMoeBlock(config), "shared_expert", ours


def deepseek_v2() -> tuple[torch.nn.Module, str, ModelConfig]:
    config = DeepseekV2Config(**SIZES, **GROUPS, topk_method="group_limited_greedy", routed_scaling_factor=4.0)
    ours = moe(
        **OUR_GROUPS,
        moe_router_pre_softmax=True,
        moe_router_group_score="max",
        moe_router_topk_scaling_factor=4.0,
        moe_shared_expert_intermediate_size=2 * WIDTH,
    )
    return DeepseekV2Moe(config), "shared_experts", ours


def deepseek_v3() -> tuple[torch.nn.Module, str, ModelConfig]:
    ours = moe(
        **OUR_GROUPS,
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_topk_scaling_factor=2.5,
        moe_shared_expert_intermediate_size=2 * WIDTH,
    )
    return DeepseekV3MoE(DeepseekV3Config(**SIZES, **GROUPS, routed_scaling_factor=2.5)), "shared_experts", ours


@torch.no_grad()
def copy_weights(theirs: torch.nn.Module, shared: str, ours: Any) -> None:
    ours.router.weight.copy_(theirs.gate.weight)
    ours.experts.weight1.copy_(theirs.experts.gate_up_proj)
    ours.experts.weight2.copy_(theirs.experts.down_proj)
    mlp = getattr(theirs, shared)
    ours.shared_experts.linear_fc1.weight.copy_(torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)))
    ours.shared_experts.linear_fc2.weight.copy_(mlp.down_proj.weight)
    if hasattr(theirs, "shared_expert_gate"):
        ours.shared_experts.gate_weight.copy_(theirs.shared_expert_gate.weight)
    if ours.router.expert_bias is not None:
        ours.router.expert_bias.copy_(theirs.gate.e_score_correction_bias)


def run(layer: Callable[..., Any], hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Output and the gradient of the input, for a fixed upstream gradient."""
    hidden = hidden.clone().requires_grad_()
    output = layer(hidden)
    output = output[0] if isinstance(output, tuple) else output
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    (gradient,) = torch.autograd.grad(output, hidden, upstream)
    return output.detach().float(), gradient.float()


def differences(
    make: Callable[[], tuple[torch.nn.Module, str, ModelConfig]], dtype: torch.dtype
) -> tuple[float, float]:
    split_process_group(ParallelConfig(), RuntimeConfig(device="cpu"))
    seed_everything(0)
    theirs, shared, model = make()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*theirs.parameters(), *theirs.buffers()):
            tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator))
    theirs = theirs.to(dtype).eval()
    if hasattr(theirs.gate, "e_score_correction_bias"):
        theirs.gate.e_score_correction_bias = theirs.gate.e_score_correction_bias.float()
    config = transformer_config(model, ParallelConfig(), PRECISIONS[dtype], RecomputeConfig())
    (network,) = build_chunks(model, ParallelConfig(), config, torch.device("cpu"))
    ours = network.decoder.layers[0].mlp.eval()
    copy_weights(theirs, shared, ours)
    hidden = torch.randn(16, 2, HIDDEN, generator=generator).to(dtype)
    pairs = zip(run(ours, hidden), run(theirs, hidden), strict=True)
    output, gradient = (float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
    return output, gradient


@pytest.mark.parametrize("dtype", PRECISIONS, ids=["fp32", "bf16"])
@pytest.mark.parametrize("make", [qwen2, deepseek_v2, deepseek_v3])
def test_layer_equals_transformers(
    make: Callable[[], tuple[torch.nn.Module, str, ModelConfig]], dtype: torch.dtype, pool: GlooPool
) -> None:
    ((output, gradient),) = pool.run(1, differences, make, dtype)
    print(f"{make.__name__} {dtype}: output {output:.1e}, gradient {gradient:.1e}")
    # fp32: sums of up to 64 products. bf16: weights, hidden units and the sum over experts are rounded to 2^-9 each,
    # at other places here and there; transformers' gate of Qwen2-MoE rounds its logits too.
    assert max(output, gradient) < (5e-6 if dtype == torch.float32 else 4e-2)
