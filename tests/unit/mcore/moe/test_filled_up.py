"""Experts that are filled up to their capacity with zeros: what they compute is what they compute of their tokens."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor

from megatron_ext.config import (
    Bf16Precision,
    Fp8Precision,
    Fp32Precision,
    LoraConfig,
    LoraTarget,
    ModelConfig,
    ParallelConfig,
    Precision,
    RecomputeConfig,
    RuntimeConfig,
)
from megatron_ext.mcore.adapters.plan import adapter_plan
from megatron_ext.mcore.model import build_chunks
from megatron_ext.mcore.moe.dispatcher import MoELayer, PaddedTokenDispatcher
from megatron_ext.mcore.transformer_config import transformer_config
from megatron_ext.proving.parity import Cell, compare, run_layout
from megatron_ext.runtime.process_groups import split_process_group
from megatron_ext.runtime.seeds import seed_everything
from megatron_ext.testing.pool import GlooPool
from megatron_ext.testing.tiny import tiny_model

GELU: dict[str, Any] = {"gated_linear_unit": False, "activation_func": "gelu", "add_bias_linear": True}
EVERY_EXPERT = LoraConfig(targets=[LoraTarget(match=["experts.*"], rank=4)])


def layer(model: ModelConfig, precision: Precision, adapters: LoraConfig | None) -> MoELayer:
    """A MoE layer in training, with the same random weights each time."""
    seed_everything(0)
    config = transformer_config(model, ParallelConfig(), precision, RecomputeConfig())
    plan = adapter_plan(model, adapters)
    (chunk,) = build_chunks(model, ParallelConfig(), config, torch.device("cpu"), plan)
    found = next(module for module in chunk.modules() if isinstance(module, MoELayer))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in found.parameters():
            weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    return (found if precision.kind == "fp32" else found.bfloat16()).train()


def trained(one: MoELayer) -> dict[str, Tensor]:
    """Output and all gradients, for a fixed input and upstream gradient."""
    generator = torch.Generator().manual_seed(1)
    hidden, upstream = torch.randn(2, 24, 2, 64, generator=generator).to(one.router.weight.dtype)
    hidden.requires_grad_()
    MoEAuxLossAutoScaler.main_loss_backward_scale = torch.ones(1)  # as a step leaves it
    output = one(hidden)[0]
    output.backward(upstream)
    gradients = {name: weight.grad for name, weight in one.named_parameters() if weight.grad is not None}
    return {"output": output.detach(), "input": hidden.grad, **gradients}


def differences(
    model: ModelConfig, precision: Precision, adapters: LoraConfig | None
) -> tuple[dict[str, float], Counter[int], list[int], bool]:
    """Relative differences of experts filled up to others; rows of an expert; whether evaluation is untouched."""
    split_process_group(ParallelConfig(), RuntimeConfig(device="cpu"))
    full = replace(model, moe_pad_expert_input_to_capacity=True)
    plain, filled = (layer(one, precision, adapters) for one in (model, full))
    assert isinstance(filled.token_dispatcher, PaddedTokenDispatcher)
    expected, measured = trained(plain), trained(filled)
    assert expected.keys() == measured.keys()
    worst = {
        name: float((measured[name] - expected[name]).abs().max() / expected[name].abs().max()) for name in expected
    }
    counts = [one.token_dispatcher.tokens_per_expert_E.tolist() for one in (filled, plain)]
    hidden = torch.randn(24, 2, 64, generator=torch.Generator().manual_seed(2)).to(filled.router.weight.dtype)
    with torch.no_grad():
        outputs = [one.eval()(hidden)[0] for one in (plain, filled)]
    return worst, Counter(counts[0]), counts[1], torch.equal(*outputs)


@pytest.mark.parametrize(
    ("fields", "precision", "adapters"),
    [
        ({}, Fp32Precision(kind="fp32"), None),
        ({}, Bf16Precision(kind="bf16"), None),
        ({}, Fp8Precision(kind="fp8", recipe="rowwise"), None),
        ({}, Fp32Precision(kind="fp32"), EVERY_EXPERT),
        (GELU, Fp32Precision(kind="fp32"), None),
    ],
    ids=["fp32", "bf16", "fp8", "adapters", "GELU with biases"],
)
@pytest.mark.parametrize("factor", [0.6, 1.25])
def test_experts_filled_up_compute_the_same(
    fields: dict[str, Any], precision: Precision, adapters: LoraConfig | None, factor: float, pool: GlooPool
) -> None:
    model = tiny_model(moe=True, moe_expert_capacity_factor=factor, **fields)
    ((worst, filled, plain, in_evaluation),) = pool.run(1, differences, model, precision, adapters)
    print({name: f"{error:.0e}" for name, error in worst.items() if error})
    # 48 tokens to 2 of 4 experts each: 24 an expert in the mean.
    assert filled == {15 if factor == 0.6 else 30: 4}
    assert factor == 0.6 or min(plain) < 30
    # Rows of zeros add nothing. Seen is 0 but for biases and adapters in fp32, whose sums are in another order; where a
    # library adds up products in another order too, bf16 is rounded otherwise, to 2^-9 of a value.
    assert max(worst.values()) < (5e-7 if precision.kind == "fp32" else 1e-2)
    assert in_evaluation


def test_ranks_that_share_a_sequence_fill_up_their_own(pool: GlooPool) -> None:
    model = tiny_model(moe=True, num_layers=2, moe_expert_capacity_factor=0.8)
    cell = Cell(model, ParallelConfig(context_parallel_size=2), steps=2, samples=2)
    full = replace(cell, model=replace(model, moe_pad_expert_input_to_capacity=True))
    found = compare(run_layout(pool, full, 2), run_layout(pool, cell, 2))
    print(f"{found.worst:.1e}")
    assert found.worst < 1e-6  # the same rows, whose sums a library of products may add up in another order
