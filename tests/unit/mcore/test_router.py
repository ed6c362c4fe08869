"""Gating-logit normalization against its formula in float64, and the router's counts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.config import Fp32Precision, GatingNormalization, ParallelConfig, RecomputeConfig, RuntimeConfig
from megatron_ext.mcore.model import build_chunks, routers
from megatron_ext.mcore.moe.metrics import collect_statistics
from megatron_ext.mcore.moe.router import _GatingLinear, normalize_gating_logits
from megatron_ext.mcore.transformer_config import transformer_config
from megatron_ext.runtime.process_groups import split_process_group
from megatron_ext.runtime.seeds import seed_everything
from megatron_ext.testing.parity import Cell, run_cell
from megatron_ext.testing.pool import GlooPool
from megatron_ext.testing.tiny import random_batch, tiny_model


@given(st.integers(2, 9), st.floats(0.1, 5.0), st.floats(1e-6, 1e-2), st.sampled_from([0, 1]), st.integers(0, 10**6))
def test_normalization_is_the_formula(experts: int, scale: float, eps: float, correction: int, seed: int) -> None:
    """Skywork-MoE eq. 6, written out in float64."""
    logits = torch.randn(5, experts, generator=torch.Generator().manual_seed(seed))
    z = logits.double()
    mean = z.sum(-1, keepdim=True) / experts
    deviation = (((z - mean) ** 2).sum(-1, keepdim=True) / (experts - correction)).sqrt()
    expected = scale * (z - mean) / (deviation + eps)
    measured = normalize_gating_logits(logits, GatingNormalization(scale=scale, eps=eps, correction=correction))
    # fp32: a dozen operations of relative error 6e-8, amplified where the deviation is small against the logits.
    assert torch.allclose(measured.double(), expected, rtol=1e-4, atol=1e-5 * scale)


def test_properties_the_paper_builds_on() -> None:
    """Invariant to scale and shift; bounded by lambda (n - 1) / sqrt(n) with the sample deviation."""
    normalization = GatingNormalization(eps=1e-12)
    logits = torch.randn(1000, 8, dtype=torch.float64)
    reference = normalize_gating_logits(logits, normalization)
    assert torch.allclose(normalize_gating_logits(7 * logits - 3, normalization), reference)
    assert reference.abs().max() <= 7 / 8**0.5 + 1e-9


def test_equal_logits_give_zeros_and_a_finite_gradient() -> None:
    logits = torch.full((2, 4), 3.0, requires_grad=True)
    normalize_gating_logits(logits, GatingNormalization()).square().sum().backward()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gating_linear_equals_autograd(dtype: torch.dtype) -> None:
    tokens = torch.randn(7, 5).to(dtype).requires_grad_()
    weight = torch.randn(3, 5).to(dtype).requires_grad_()
    upstream = torch.randn(7, 3)
    measured = torch.autograd.grad(_GatingLinear.apply(tokens, weight), (tokens, weight), upstream)
    expected = torch.autograd.grad(tokens.float() @ weight.float().t(), (tokens, weight), upstream)
    assert all(torch.equal(m, e) for m, e in zip(measured, expected, strict=True))


def statistics(parallel: ParallelConfig, recompute: str | None) -> tuple[dict[int, list[float]], dict[int, float], int]:
    """Train one step and collect what the routers counted."""
    import torch.distributed as dist
    from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: F401 - the schedules

    from megatron_ext.mcore import model as model_module
    from megatron_ext.testing import parity

    kept: list = []
    real = model_module.build_chunks

    def keep(*args, **kwargs):
        kept.extend(real(*args, **kwargs))
        return kept

    parity.build_chunks = keep
    try:
        run_cell(Cell(tiny_model(moe=True), parallel, recompute=RecomputeConfig(granularity=recompute), steps=1))
    finally:
        parity.build_chunks = real
    tokens = sum(int(r.load.sum()) for r in routers(kept) if r.load is not None)
    world = dist.group.WORLD
    result = collect_statistics(
        routers(kept), num_layers=4, num_experts=4, num_microbatches=8, group=world, device=torch.device("cpu")
    )
    assert all(r.load is None for r in routers(kept)), "counts are reset"
    return result.load, result.balance_loss, tokens


@pytest.mark.parametrize(
    ("processes", "degrees"),
    [
        (2, {}),
        (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
        (2, {"pipeline_model_parallel_size": 2}),
        (2, {"expert_model_parallel_size": 2}),
    ],
    ids=["dp2", "tp2", "pp2", "ep2"],
)
def test_every_layout_counts_what_one_process_counts(processes: int, degrees: dict, pool: GlooPool) -> None:
    ((load, balance, assignments),) = pool.run(1, statistics, ParallelConfig(), None)
    assert sorted(load) == [1, 2, 3], "the first layer is dense"
    assert assignments == 3 * 8 * 32 * 2, "3 MoE layers, 8 samples of 32 tokens, top-2"
    for other_load, other_balance, _ in pool.run(processes, statistics, ParallelConfig(**degrees), None):
        assert other_load == load
        assert other_balance == pytest.approx(balance, rel=1e-5)


def test_recomputed_tokens_are_counted_once(pool: GlooPool) -> None:
    assert pool.run(1, statistics, ParallelConfig(), "full") == pool.run(1, statistics, ParallelConfig(), None)


def balance_losses() -> tuple[float, float]:
    """The logged balance loss of a layer, and E * sum f_i P_i computed from its logits by hand."""
    split_process_group(ParallelConfig(), RuntimeConfig(device="cpu"))
    seed_everything(0)
    model = tiny_model(moe=True)
    config = transformer_config(model, ParallelConfig(), Fp32Precision(kind="fp32"), RecomputeConfig())
    (network,) = build_chunks(model, ParallelConfig(), config, torch.device("cpu"))
    router = routers([network])[0]
    with torch.no_grad():
        router.weight.normal_(generator=torch.Generator().manual_seed(0))
    hidden = torch.randn(16, 2, 64, generator=torch.Generator().manual_seed(1))
    router.train()(hidden)
    probabilities = router.gating(hidden).view(-1, 4).double().softmax(-1)
    chosen = probabilities.topk(2, dim=-1).indices.flatten()
    share = torch.bincount(chosen, minlength=4) / chosen.numel()
    return float(router.balance_loss), float(4 * (share * probabilities.mean(0)).sum())


def test_balance_loss_is_the_switch_loss_of_the_normalized_logits(pool: GlooPool) -> None:
    ((logged, by_hand),) = pool.run(1, balance_losses)
    assert logged == pytest.approx(by_hand, rel=1e-6)


def test_random_batches_are_the_same_everywhere() -> None:
    one = random_batch(3, samples=4, micro_batch=1, dp_rank=1, dp_size=2)
    two = random_batch(3, samples=4, micro_batch=1, dp_rank=0, dp_size=1)
    assert torch.equal(one[0].tokens, two[1].tokens)
