"""The losses of the router: the gradient of each against the papers' formulas in float64, in every layout."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor

from megatron_ext.config import (
    ModelConfig,
    ParallelConfig,
)
from megatron_ext.mcore.moe.counts import RouterCounts
from megatron_ext.mcore.moe.router import _GatingLinear
from megatron_ext.testing.pool import GlooPool
from megatron_ext.testing.tiny import tiny_model
from tests.unit.mcore.moe.gates import ALONE, EXPERTS, LAYOUTS, build_router, hidden_states, my_part


def loss_gradient(model: ModelConfig, parallel: ParallelConfig, precision: str = "fp32") -> Tensor:
    """Gradient of the router's weight from its losses alone, reduced as in training."""
    router = build_router(model, parallel, precision)
    MoEAuxLossAutoScaler.main_loss_backward_scale = torch.ones(1) * parallel.context_parallel_size
    hidden = hidden_states().to(router.weight.dtype)
    weights, _ = router(my_part(hidden, router))
    (weights * 0).sum().backward()
    assert router.weight.grad is not None
    gradient = router.weight.grad.float()
    dist.all_reduce(gradient, group=parallel_state.get_tensor_model_parallel_group())
    data = parallel_state.get_data_parallel_group(with_context_parallel=True)
    dist.all_reduce(gradient, group=data)
    return gradient / data.size()


def formula_gradient(model: ModelConfig, micro_batches: int, precision: str = "fp32") -> Tensor:
    """The same from the papers' formulas, in float64 over all tokens at once."""
    weight = build_router(model, precision=precision).weight.detach().double().requires_grad_()
    hidden = hidden_states().to(torch.bfloat16 if precision == "bf16" else torch.float32).double()
    parts = [formula_parts(model, hidden_SBH @ weight.t()) for hidden_SBH in hidden.chunk(micro_batches, dim=1)]
    total = torch.zeros((), dtype=torch.float64)
    everywhere = torch.stack([counts.sum(dim=0) for _, _, counts in parts]).sum(dim=0)
    for raw, probabilities_SBE, counts_BE in parts:
        mean_BE = probabilities_SBE.mean(dim=0)
        share = {
            "aux_loss": counts_BE.sum(dim=0) / counts_BE.sum(),
            "seq_aux_loss": counts_BE / counts_BE.sum(dim=-1, keepdim=True),
            "global_aux_loss": everywhere / everywhere.sum(),
        }
        for kind, coefficient in model.balance_losses.items():
            total = total + coefficient * EXPERTS * (share[kind] * mean_BE).sum(dim=-1).mean() / micro_batches
        total = total + model.moe_z_loss_coeff * raw.exp().sum(dim=-1).log().square().mean() / micro_batches
    (gradient,) = torch.autograd.grad(total, weight)
    return gradient


def formula_parts(model: ModelConfig, raw_SBE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits and probabilities [S, B, E], and how often each sequence chose each expert [B, E]."""
    logits = raw_SBE
    if model.moe_gating_normalization is not None:
        deviation = raw_SBE.std(dim=-1, keepdim=True) + model.moe_gating_normalization.eps
        logits = (raw_SBE - raw_SBE.mean(dim=-1, keepdim=True)) / deviation
    if model.moe_router_score_function == "sigmoid":
        probabilities = torch.sigmoid(logits) / torch.sigmoid(logits).sum(dim=-1, keepdim=True)
    else:
        probabilities = logits.exp() / logits.exp().sum(dim=-1, keepdim=True)
    best = logits.topk(model.moe_router_topk, dim=-1).indices
    counts = torch.zeros_like(logits).scatter(-1, best, 1.0).sum(dim=0)
    return raw_SBE, probabilities, counts


def with_loss(kinds: str | list[str], coefficients: Any, **changes: Any) -> ModelConfig:
    return tiny_model(moe=True, moe_router_load_balancing_type=kinds, moe_aux_loss_coeff=coefficients, **changes)


LOSSES = {
    "aux_loss": with_loss("aux_loss", 1.0),
    "seq_aux_loss": with_loss("seq_aux_loss", 1.0),
    "global_aux_loss": with_loss("global_aux_loss", 1.0),
    "z_loss": with_loss("none", 0.0, moe_z_loss_coeff=1.0),
    "list": with_loss(["seq_aux_loss", "global_aux_loss", "aux_loss"], [0.5, 2.0, 0.1], moe_z_loss_coeff=0.3),
    "without gating norm": with_loss("aux_loss", 1.0, moe_gating_normalization=None),
    "sigmoid with bias": with_loss(
        "seq_aux_loss", 1.0, moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True
    ),
}


def relative(measured: Tensor, expected: Tensor) -> float:
    return float((measured - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_of_each_loss_is_the_formulas(loss: str, layout: str, pool: GlooPool) -> None:
    processes, parallel = LAYOUTS[layout]
    micro_batches = processes // (parallel.tensor_model_parallel_size * parallel.context_parallel_size)
    (expected,) = pool.run(1, formula_gradient, LOSSES[loss], micro_batches)
    for measured in pool.run(processes, loss_gradient, LOSSES[loss], parallel):
        difference = relative(measured, expected)
        print(f"{loss}, {layout}: {difference:.1e}")
        # fp32: sums over 64 tokens and logits of size 1, roundings of 6e-8 each. Wrong scales are factors of 2.
        assert difference < 1e-5


@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_of_each_loss_in_bf16(loss: str, pool: GlooPool) -> None:
    """The gate computes in fp32 from bf16 weights and tokens; only the gradient is rounded, to 2 ** -9 at most."""
    (expected,) = pool.run(1, formula_gradient, LOSSES[loss], 1, "bf16")
    (measured,) = pool.run(1, loss_gradient, LOSSES[loss], ALONE, "bf16")
    assert relative(measured, expected) < 2**-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gating_linear_equals_autograd(dtype: torch.dtype) -> None:
    tokens = torch.randn(7, 5).to(dtype).requires_grad_()
    weight = torch.randn(3, 5).to(dtype).requires_grad_()
    upstream = torch.randn(7, 3)
    measured = torch.autograd.grad(_GatingLinear.apply(tokens, weight), (tokens, weight), upstream)
    expected = torch.autograd.grad(tokens.float() @ weight.float().t(), (tokens, weight), upstream)
    assert all(torch.equal(m, e) for m, e in zip(measured, expected, strict=True))


def global_loss_over_micro_batches() -> tuple[list[float], list[float]]:
    """The global-batch loss of two micro-batches of a step, and of the next step; logged, and by hand."""
    router = build_router(LOSSES["global_aux_loss"])
    logged, by_hand = [], []
    hidden = hidden_states()
    for step in range(2):
        router.begin_step()
        counts = torch.zeros(EXPERTS, dtype=torch.float64)
        for micro_batch in hidden.roll(step, dims=1).chunk(2, dim=1):
            router.counts = RouterCounts(EXPERTS)
            router(micro_batch)
            assert router.counts.sums is not None
            logged.append(float(router.counts.sums[-2]))
            _, probabilities, chosen = formula_parts(router.model, micro_batch.double() @ router.weight.t().double())
            counts += chosen.sum(dim=0)
            by_hand.append(float(EXPERTS * (counts / counts.sum() * probabilities.mean(dim=(0, 1))).sum()))
    return logged, by_hand


def test_global_loss_remembers_the_micro_batches_of_its_step(pool: GlooPool) -> None:
    ((logged, by_hand),) = pool.run(1, global_loss_over_micro_batches)
    assert logged == pytest.approx(by_hand, rel=1e-6)
