"""Upcycling methods on one layer, in float64: which keep the function, and what the others change."""

#   T tokens, H hidden, E experts, F neurons

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_ext.config import GatingNormalization, ModelConfig
from megatron_ext.errors import ConfigError
from megatron_ext.upcycling.feed_forward import FeedForward
from megatron_ext.upcycling.methods.base import Draw, Method
from megatron_ext.upcycling.methods.copy import Copy
from megatron_ext.upcycling.methods.drop import Drop
from megatron_ext.upcycling.methods.fine_grained import FineGrained
from megatron_ext.upcycling.methods.mix import Mix
from megatron_ext.upcycling.methods.noise import Noise
from megatron_ext.upcycling.methods.qwen import Shuffle
from megatron_ext.upcycling.methods.shared_routed import SharedRouted
from megatron_ext.upcycling.router import drawn_router, router_from_activations
from tests.unit.upcycling.one_layer import (
    DENSE,
    EXACT,
    HIDDEN,
    WIDTH,
    model,
    moe_output,
    network,
    output,
    part,
    tokens,
    upcycled,
)


def distance(method: Method, moe: ModelConfig, sources: Sequence[FeedForward], seed: int = 0) -> float:
    """Largest difference between the MoE layer and the first source, of the output's scale."""
    x_TH = tokens()
    expected = output(sources[0], x_TH)
    return float(
        (moe_output(upcycled(method, moe, sources, seed), moe, x_TH) - expected).abs().max() / expected.abs().max()
    )


GATES: dict[str, dict[str, Any]] = {
    "softmax of the selected": {},
    "normalized": {"moe_gating_normalization": GatingNormalization(scale=2.0)},
    "softmax over all, divided by their sum": {"moe_router_pre_softmax": True, "moe_router_norm_topk_prob": True},
    "sigmoid with bias": {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
    "another scaling factor": {"moe_router_topk_scaling_factor": 2.5},
    "gated shared expert": {"moe_shared_expert_gate": True, "moe_shared_expert_intermediate_size": 8},
}
KEEPING: dict[str, Method] = {
    "copy": Copy(),
    "drop nothing": Drop(ratio=0.0),
    "no noise": Noise(std=0.0),
    "fine-grained, 2 parts": FineGrained(granularity=2),
    "fine-grained, 4 parts": FineGrained(granularity=4),
    "shared and routed, 2 parts": SharedRouted(granularity=2),
    "shared and routed, 4 parts in order": SharedRouted(granularity=4, shuffle=False),
}


@pytest.mark.parametrize("kind", ["SwiGLU", "GELU with biases", "SwiGLU with biases"])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("name", KEEPING)
def test_the_function_is_kept_whatever_the_router_says(name: str, gate: str, kind: str) -> None:
    method, changes = KEEPING[name], GATES[gate]
    if isinstance(method, SharedRouted):
        changes = {"moe_shared_expert_intermediate_size": 8, **changes}
    moe = model(method, **changes)
    source = network(gated="SwiGLU" in kind, biased="biases" in kind)
    assert method.inexact(moe) is None
    worst = max(distance(method, moe, [source], seed) for seed in (1, 2, 3))
    print(f"{name}, {gate}, {kind}: {worst:.1e} of the output's scale")
    assert worst < EXACT


CHANGING: dict[str, tuple[Method, dict[str, Any], str]] = {
    "weights that sum to anything": (Copy(), {"moe_router_pre_softmax": True}, "do not sum to a constant"),
    "weights scaled as in the paper": (FineGrained(granularity=2, scale="paper"), {}, "only where all experts"),
    "half of the neurons new": (Drop(), {}, "50% of each expert's neurons are new"),
    "narrower experts": (Drop(ratio=0.0), {"moe_ffn_hidden_size": 20}, "20 of 24 neurons"),
    "noise": (Noise(), {}, "50% of each expert's neurons have noise"),
    "Qwen": (Shuffle(ratio=0.0), {"moe_ffn_hidden_size": 16}, "neurons of its own choice"),
    "groups that tear sets apart": (
        FineGrained(granularity=2),
        {"moe_router_num_groups": 2, "moe_router_group_topk": 1},
        "group-limited routing",
    ),
}


@pytest.mark.parametrize("name", CHANGING)
def test_a_changed_function_is_announced(name: str) -> None:
    method, changes, reason = CHANGING[name]
    moe = model(method, **changes)
    assert reason in str(method.inexact(moe))
    # What is announced is seen, but for groups: whether they tear a set apart depends on the tokens.
    if "group" not in reason:
        assert distance(method, moe, [network()]) > 1e-3


def test_a_factor_that_rounds_in_bf16_is_announced() -> None:
    method = SharedRouted(granularity=4)
    moe = model(method, moe_shared_expert_intermediate_size=8, moe_router_topk_scaling_factor=2.5)
    assert method.inexact(moe) is None
    assert "a factor 1.6 goes into the experts' output weights" in str(method.inexact(moe, torch.bfloat16))
    assert method.inexact(replace(moe, moe_router_topk_scaling_factor=2.0), torch.bfloat16) is None


def test_the_papers_weights_are_right_for_even_probabilities() -> None:
    """Equal logits for all experts: softmax gives each 1 / E, and top-k takes the first T, which are whole sets."""
    method = FineGrained(granularity=2, scale="paper")
    moe, source = model(method, activation_func="gelu", gated_linear_unit=False), network(gated=False, biased=True)
    linear = replace(source, fc1_bias=None)
    tensors = upcycled(method, moe, [linear])
    weight = 1 / 8
    # ReLU-like networks are homogeneous: the two roots of the factor multiply. With GELU only matrices show it.
    products = [part(tensors, f"mlp.experts.{e}") for e in range(4)]
    total = sum(weight * ffn.fc2 @ ffn.fc1 for ffn in products)
    assert torch.allclose(total, source.fc2 @ source.fc1, rtol=1e-12)
    assert method.folded(replace(moe, moe_router_topk_scaling_factor=2.5)) == 1 / 2.5
    biases = sum(weight * ffn.fc2_bias for ffn in products)  # type: ignore[misc]
    assert torch.allclose(torch.as_tensor(biases), source.fc2_bias, rtol=1e-12)


@pytest.mark.parametrize("shared_indices", [True, False])
@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_drop_replaces_its_share_by_numbers_like_those_dropped(ratio: float, shared_indices: bool) -> None:
    width, experts = 400, 3
    dense = replace(DENSE, ffn_hidden_size=width)
    method = Drop(ratio=ratio, shared_indices=shared_indices)
    moe = replace(dense, num_moe_experts=experts)
    generator = torch.Generator().manual_seed(0)
    # Each matrix has a mean and a deviation of its own.
    matrices = [torch.randn(width, HIDDEN, generator=generator) * std + mean for std, mean in ((1, 0), (2, 1), (3, -1))]
    source = FeedForward(torch.cat(matrices[:2]), matrices[2].t())
    method.check(dense, moe)
    made = [method.expert(number, source, moe, Draw(0, "mlp")) for number in range(experts)]
    changed_by_expert = []
    for ffn in made:
        changed = []
        for new, old in zip((*ffn.fc1.chunk(2), ffn.fc2.t()), matrices, strict=True):
            rows = (new != old).any(dim=1)
            assert int(rows.sum()) == int(ratio * width)
            drawn, dropped = new[rows], old[rows]
            error = float(dropped.std()) / drawn.numel() ** 0.5
            assert abs(float(drawn.mean() - dropped.mean())) < 3 * error
            # The standard error of a normal sample's deviation is std / sqrt(2 n).
            assert abs(float(drawn.std() - dropped.std())) < 3 * error / 2**0.5
            changed.append(rows)
        together = bool(torch.equal(changed[0], changed[1]) and torch.equal(changed[0], changed[2]))
        assert together == shared_indices
        changed_by_expert.append(changed[0])
    assert not torch.equal(changed_by_expert[0], changed_by_expert[1])


def test_qwens_experts_are_cut_from_shuffled_copies() -> None:
    """9 experts of 16 neurons from 24: six copies, in each of which every neuron occurs once."""
    method = Shuffle(ratio=0.0)
    moe, source = replace(DENSE, num_moe_experts=9, moe_ffn_hidden_size=16), network()
    made = [method.expert(number, source, moe, Draw(0, "mlp")) for number in range(9)]
    columns = torch.cat([ffn.fc2 for ffn in made], dim=1)
    owner = torch.stack([(source.fc2 == column[:, None]).all(dim=0).nonzero()[0, 0] for column in columns.t()])
    for copy in owner.view(-1, WIDTH):
        assert sorted(copy.tolist()) == list(range(WIDTH))
    assert owner[:WIDTH].tolist() != sorted(owner[:WIDTH].tolist())
    gate, up = made[0].fc1.chunk(2)
    assert torch.equal(gate, source.fc1[:WIDTH][owner[:16]])
    assert torch.equal(up, source.fc1[WIDTH:][owner[:16]])
    half = [Shuffle(ratio=0.5).expert(number, source, moe, Draw(0, "mlp")) for number in range(9)]
    kept = [(new.fc2 == old.fc2).all(dim=0).sum() for new, old in zip(half, made, strict=True)]
    assert [int(count) for count in kept] == [8] * 9


def test_the_papers_weights_of_gated_layers_are_cube_roots() -> None:
    """Three matrices multiply in a gated layer: without its activation the product grows by E G / T."""
    method = FineGrained(granularity=2, scale="paper")
    moe, source = model(method), network()
    ffn = method.expert(0, source, moe, Draw(0, "mlp"))
    half = source.neurons(torch.arange(WIDTH // 2))
    grown = [(new / old).unique() for new, old in ((ffn.fc1, half.fc1), (ffn.fc2, half.fc2))]
    factor = (8 * 2 / 4) ** (1 / 3)
    assert all(torch.allclose(ratio, torch.full_like(ratio, factor), rtol=1e-12) for ratio in grown)


def test_noise_has_its_deviation_and_leaves_the_rest() -> None:
    width = 400
    source = FeedForward(torch.zeros(2 * width, HIDDEN, dtype=torch.float64), torch.zeros(HIDDEN, width).double())
    ffn = Noise(ratio=0.25, std=0.3).expert(0, source, replace(DENSE, ffn_hidden_size=width), Draw(0, "mlp"))
    noisy = ffn.fc2[:, (ffn.fc2 != 0).any(dim=0)]
    assert noisy.shape == (HIDDEN, width // 4)
    # The standard error of a normal sample's deviation is std / sqrt(2 n).
    assert abs(float(noisy.std()) - 0.3) < 4 * 0.3 / (2 * noisy.numel()) ** 0.5


def test_what_qwen_draws_anew_is_as_initial_weights_are() -> None:
    width = 400
    dense = replace(DENSE, ffn_hidden_size=width, init_method_std=0.05)
    ones = FeedForward(torch.ones(width, HIDDEN), torch.ones(HIDDEN, width), torch.ones(width), torch.ones(HIDDEN))
    ffn = Shuffle(ratio=0.5).expert(0, ones, replace(dense, num_moe_experts=4), Draw(0, "mlp"))
    new = ffn.fc2[:, (ffn.fc2 != 1).any(dim=0)]
    assert new.shape == (HIDDEN, width // 2)
    assert abs(float(new.std()) - 0.05) < 4 * 0.05 / (2 * new.numel()) ** 0.5
    assert ffn.fc1_bias is not None
    assert sorted(ffn.fc1_bias.tolist()) == [0.0] * 200 + [1.0] * 200


@pytest.mark.parametrize("shared", ["silent", "average"])
def test_mixing_equal_models_keeps_the_function(shared: str) -> None:
    method = Mix(shared_experts=shared, source_weights=[1.0, 3.0])
    moe = model(method, moe_shared_expert_intermediate_size=WIDTH, moe_shared_expert_gate=True)
    same = network(biased=True)
    assert distance(method, moe, [same, same]) < EXACT


def test_mixing_takes_each_expert_from_its_source_and_averages_the_shared_one() -> None:
    method = Mix(shared_experts="average", source_weights=[1.0, 3.0])
    moe = model(method, moe_shared_expert_intermediate_size=WIDTH)
    first, second = network(0), network(1)
    tensors = upcycled(method, moe, [first, second])
    for expert in range(8):
        source = first if expert < 4 else second
        assert torch.equal(tensors[f"mlp.experts.{expert}.linear_fc1.weight"], source.fc1)
        assert torch.equal(tensors[f"mlp.experts.{expert}.linear_fc2.weight"], source.fc2 * 0.5)
    average = (first.fc1 + 3 * second.fc1) / 4
    assert torch.allclose(tensors["mlp.shared_experts.linear_fc1.weight"].double(), average, atol=1e-6)


REFUSED: list[tuple[Method, dict[str, Any], str]] = [
    (
        Copy(),
        {"moe_ffn_hidden_size": 12},
        "moe_ffn_hidden_size = 12: copying needs experts of the dense layer's width, 24",
    ),
    (FineGrained(granularity=5), {}, "granularity = 5: the dense layer's width, 24, is no multiple of it"),
    (FineGrained(granularity=4), {"moe_router_topk": 2}, "moe_router_topk = 2"),
    (FineGrained(granularity=4), {"num_moe_experts": 10}, "num_moe_experts = 10"),
    (FineGrained(granularity=8), {"moe_router_topk": 8}, "leaves the router nothing to choose"),
    (FineGrained(granularity=2, scale="paper"), {"moe_router_score_function": "sigmoid"}, "set scale: exact"),
    (SharedRouted(), {}, "shared_expert_size = None: must be set"),
    (SharedRouted(), {"moe_shared_expert_intermediate_size": 24}, "smaller than the dense layer, 24"),
    (
        SharedRouted(granularity=3),
        {"moe_shared_expert_intermediate_size": 8},
        "the 16 neurons beside the shared expert",
    ),
    (Mix(shared_experts="average"), {}, "shared_expert_size = None: with --shared-experts average it must be 24"),
    (
        FineGrained(granularity=2, scale="paper"),
        {"moe_gating_normalization": GatingNormalization()},
        "pass --no-gating-normalization",
    ),
    (Drop(), {"moe_ffn_hidden_size": 32}, "cannot be wider than the dense layer, 24"),
    (
        Mix(shared_experts="average"),
        {"moe_shared_expert_intermediate_size": 8},
        "shared_expert_size = 8: with --shared-experts average it must be 24",
    ),
]


@pytest.mark.parametrize(("method", "changes", "complaint"), REFUSED)
def test_what_a_method_cannot_make_is_refused(method: Method, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError) as error:
        method.check(DENSE, model(method, **changes))
    assert complaint in str(error.value)


@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_routers_are_drawn_with_the_deviation_asked_for(kind: str) -> None:
    moe = replace(DENSE, num_moe_experts=128)
    weight = drawn_router(kind, 0.3, moe, Copy(), Draw(1, "mlp"))
    n = weight.numel()
    assert abs(float(weight.mean())) < 4 * 0.3 / n**0.5
    assert float(weight.std()) == pytest.approx(0.3, rel=0.03)
    assert (float(weight.abs().max()) <= 0.3 * 3**0.5) == (kind == "uniform")
    assert torch.equal(weight, drawn_router(kind, 0.3, moe, Copy(), Draw(1, "mlp")))
    assert not torch.equal(weight, drawn_router(kind, 0.3, moe, Copy(), Draw(2, "mlp")))


def test_experts_of_a_set_share_a_row_bit_for_bit() -> None:
    method = FineGrained(granularity=4)
    rows = drawn_router("normal", 0.02, model(method), method, Draw(0, "mlp")).view(2, 4, HIDDEN)
    assert all(torch.equal(rows[:, 0], rows[:, i]) for i in range(4))
    assert not torch.equal(rows[0], rows[1])


def test_a_router_from_activations_finds_the_clusters() -> None:
    """Four kinds of tokens around one mean: each kind goes to an expert of its own, and logits vary by 1."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.linalg.qr(torch.randn(HIDDEN, 4, generator=generator)).Q.t() * 4
    kinds = torch.arange(400) % 4
    inputs = 1.0 + centres[kinds] + 0.3 * torch.randn(400, HIDDEN, generator=generator)
    weight = router_from_activations(inputs, 4, torch.Generator().manual_seed(1))
    logits = inputs @ weight.t()
    best = logits.argmax(dim=1)
    assert [len(best[kinds == kind].unique()) for kind in range(4)] == [1] * 4
    assert len(best.unique()) == 4
    assert float((weight @ inputs.mean(dim=0)).abs().max()) < 1e-4, "what all tokens share favours nobody"
    assert float(logits.std(dim=1).mean()) == pytest.approx(1.0, rel=1e-4)
