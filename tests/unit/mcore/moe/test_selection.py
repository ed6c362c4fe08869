"""Scores, selection and weights of every router of the field, against transformers' modules and float64 formulas."""

import math

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV2Config, DeepseekV3Config, MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from megatron_ext.config import GatingNormalization, ModelConfig
from megatron_ext.mcore.moe.selection import (
    Capacity,
    choose,
    normalize_gating_logits,
    probabilities_of,
    scores_of,
    weights_of,
)
from megatron_ext.testing.tiny import tiny_model

HIDDEN, EXPERTS = 24, 8


def routed(model: ModelConfig, logits_TE: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """The weight of each expert for each token [T, E]."""
    scores_TE = scores_of(logits_TE, model)
    experts_TK = choose(logits_TE, scores_TE, model, bias_E)
    return torch.zeros_like(logits_TE).scatter(1, experts_TK, weights_of(logits_TE, scores_TE, experts_TK, model))


def spread(experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
    return torch.zeros(len(experts_TK), EXPERTS).scatter(1, experts_TK, weights_TK.float())


def gate(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(50, HIDDEN, generator=generator).to(dtype)
    return tokens, torch.randn(EXPERTS, HIDDEN, generator=generator).to(dtype)


def moe(**fields: object) -> ModelConfig:
    return tiny_model(moe=True, num_moe_experts=EXPERTS, moe_gating_normalization=None, **fields)


GROUPS = {"moe_router_topk": 3, "moe_router_num_groups": 4, "moe_router_group_topk": 2}
HF_GROUPS = {"n_routed_experts": EXPERTS, "n_group": 4, "topk_group": 2, "num_attention_heads": 2}
SIZES = {"hidden_size": HIDDEN, "num_experts_per_tok": 3}
V3_BIAS = torch.linspace(0.0, 0.3, EXPERTS)
REFERENCES = {
    "mixtral": (
        MixtralTopKRouter(MixtralConfig(**SIZES, num_local_experts=EXPERTS)),
        moe(moe_router_topk=3),
    ),
    "qwen2_moe": (
        Qwen2MoeTopKRouter(Qwen2MoeConfig(**SIZES, num_experts=EXPERTS)),
        moe(moe_router_topk=3, moe_router_pre_softmax=True),
    ),
    "qwen3_moe": (
        Qwen3MoeTopKRouter(Qwen3MoeConfig(**SIZES, num_experts=EXPERTS, norm_topk_prob=True)),
        moe(moe_router_topk=3, moe_router_pre_softmax=True, moe_router_norm_topk_prob=True),
    ),
    "deepseek_v2": (
        DeepseekV2TopkRouter(
            DeepseekV2Config(**SIZES, **HF_GROUPS, topk_method="group_limited_greedy", routed_scaling_factor=16.0)
        ),
        moe(**GROUPS, moe_router_pre_softmax=True, moe_router_group_score="max", moe_router_topk_scaling_factor=16.0),
    ),
    "deepseek_v3": (
        DeepseekV3TopkRouter(DeepseekV3Config(**SIZES, **HF_GROUPS, routed_scaling_factor=2.5)),
        moe(
            **GROUPS,
            moe_router_score_function="sigmoid",
            moe_router_enable_expert_bias=True,
            moe_router_topk_scaling_factor=2.5,
        ),
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", REFERENCES)
def test_routing_equals_transformers(name: str, dtype: torch.dtype) -> None:
    router, model = REFERENCES[name]
    generator = torch.Generator().manual_seed(0)
    # transformers computes some gates in the model's dtype, ours is fp32 always: both get values of `dtype` in fp32.
    tokens = torch.randn(50, HIDDEN, generator=generator).to(dtype).float()
    router.weight.copy_(torch.randn(EXPERTS, HIDDEN, generator=generator).to(dtype))
    bias = V3_BIAS if model.moe_router_enable_expert_bias else None
    if bias is not None:
        router.e_score_correction_bias.copy_(bias)
    _, weights_TK, experts_TK = router(tokens)
    expected = torch.zeros(50, EXPERTS).scatter(1, experts_TK, weights_TK)
    measured = routed(model, tokens @ router.weight.t(), bias)
    difference = float((measured - expected).abs().max() / expected.abs().max())
    print(f"{name} {dtype}: {difference:.1e}")
    assert torch.equal(measured > 0, expected > 0), "other experts"
    # Softmax, division and scaling in another order: a few roundings of 6e-8.
    assert difference < 1e-6


def test_groups_score_by_their_two_best_in_float64() -> None:
    logits = torch.randn(40, EXPERTS, dtype=torch.float64)
    _, model = REFERENCES["deepseek_v3"]
    for token, row in zip(logits, routed(model, logits, V3_BIAS.double()), strict=True):
        scores = [1 / (1 + math.exp(-z)) for z in token.tolist()]
        choice = [s + b for s, b in zip(scores, V3_BIAS.tolist(), strict=True)]
        groups = sorted(range(4), key=lambda g: -sum(choice[2 * g : 2 * g + 2]))[:2]
        best = sorted((e for g in groups for e in (2 * g, 2 * g + 1)), key=lambda e: -choice[e])[:3]
        total = sum(scores[e] for e in best)
        expected = [2.5 * scores[e] / total if e in best else 0.0 for e in range(EXPERTS)]
        assert row.tolist() == pytest.approx(expected, rel=1e-6)


def test_sigmoid_scores_become_a_distribution() -> None:
    logits = torch.randn(10, EXPERTS)
    _, model = REFERENCES["deepseek_v3"]
    probabilities = probabilities_of(scores_of(logits, model), model)
    assert torch.allclose(probabilities.sum(dim=-1), torch.ones(10))
    assert torch.allclose(probabilities, logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True))


def normalized_by_hand(logits: Tensor, normalization: GatingNormalization) -> Tensor:
    rows = []
    for row in logits.double().tolist():
        mean = sum(row) / len(row)
        variance = sum((z - mean) ** 2 for z in row) / (len(row) - normalization.correction)
        rows.append([normalization.scale * (z - mean) / (math.sqrt(variance) + normalization.eps) for z in row])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("eps", [1e-5, 1e-2])
@pytest.mark.parametrize("correction", [0, 1])
def test_normalization_is_the_formula(scale: float, eps: float, correction: int) -> None:
    normalization = GatingNormalization(scale=scale, eps=eps, correction=correction)
    logits = torch.randn(64, EXPERTS) * torch.logspace(-2, 2, 64)[:, None]
    measured = normalize_gating_logits(logits, normalization)
    # Subtracting the mean in fp32 leaves 6e-8 of the logits, divided by their deviation.
    assert torch.allclose(measured.double(), normalized_by_hand(logits, normalization), rtol=1e-4, atol=1e-5 * scale)


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


def kept_by_hand(weights: Tensor, chosen: Tensor, places: int, policy: str) -> Tensor:
    kept = torch.zeros_like(chosen)
    for expert in range(chosen.shape[1]):
        tokens = [t for t in range(len(chosen)) if chosen[t, expert]]
        if policy == "probs":
            tokens.sort(key=lambda t: -float(weights[t, expert]))
        for token in tokens[:places]:
            kept[token, expert] = True
    return kept


@pytest.mark.parametrize("policy", ["probs", "position"])
@pytest.mark.parametrize(("factor", "places"), [(0.5, 5), (1.0, 10), (1.25, 13), (100.0, 40)])
def test_an_expert_takes_its_capacity(policy: str, factor: float, places: int) -> None:
    """40 tokens, 2 experts each of 8: the mean load is 10."""
    weights = routed(moe(), torch.randn(40, EXPERTS))
    chosen = weights > 0
    kept = Capacity(factor, policy).kept(weights, chosen, 2)
    assert torch.equal(kept, kept_by_hand(weights, chosen, places, policy))
    assert bool((kept.sum(dim=0) <= places).all())
