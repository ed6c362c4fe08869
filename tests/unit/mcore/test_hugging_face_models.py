"""Every architecture against transformers' own models: logits and gradients with the same weights, in fp32 and bf16."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ext.architectures.registry import architecture_of
from megatron_ext.config import (
    Bf16Precision,
    Fp32Precision,
    ModelConfig,
    ParallelConfig,
    Precision,
    RuntimeConfig,
)
from megatron_ext.runtime.process_groups import split_process_group
from megatron_ext.runtime.seeds import seed_everything
from megatron_ext.testing.pool import GlooPool
from tests.unit.mcore.our_network import canonical, gradients_by_name, our_network, relative
from tests.unit.model_io import references
from tests.unit.model_io.references import LLAMA3, REFERENCES, YARN, Sizes, Tensors, randomize, raw_config

LENGTH = 48
SIZES = Sizes(layers=2, heads=4, groups=2, width=16, head=24, ffn=96, expert=40)
# Which experts are selected, rounding to bf16 would decide otherwise for some tokens; so there, all are.
EVERY = replace(SIZES, chosen=SIZES.experts)


@dataclass(frozen=True)
class Case:
    """A transformers model, as a function of its sizes, and one of the same class that sends tokens to all experts."""

    hf_class: str
    build: Callable[[Sizes], Any]
    build_every: Callable[[Sizes], Any]


def _cases() -> dict[str, Case]:
    cases = {hf_class: Case(hf_class, build, build) for hf_class, build in REFERENCES.items()}
    # Groups of experts cannot all be selected.
    for hf_class, changes in {
        "DeepseekV2ForCausalLM": {"topk_method": "greedy"},
        "DeepseekV3ForCausalLM": {"n_group": 1, "topk_group": 1},
    }.items():
        build = cases[hf_class].build
        cases[hf_class] = Case(hf_class, build, lambda s, build=build, changes=changes: build(s, **changes))
    for name, parameters in SCALINGS.items():

        def scaled(s: Sizes, parameters: dict[str, Any] = parameters) -> Any:
            return references.llama(s, **parameters)

        cases[f"Llama, {name}"] = Case("LlamaForCausalLM", scaled, scaled)

    def moonlight(s: Sizes) -> Any:
        return references.deepseek_v3(s, rms_norm_eps=1e-2, n_group=1, topk_group=1)  # 1e-5 would not show in bf16

    cases["Moonlight, whose norms have two epsilons"] = Case("DeepseekV3ForCausalLM", moonlight, moonlight)
    return cases


def _rope(name: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": name, "rope_theta": 10000.0, "factor": 4.0, **parameters}}


SCALINGS: dict[str, dict[str, Any]] = {
    "linear": _rope("linear"),
    "dynamic": _rope("dynamic") | {"max_position_embeddings": 16},
    "dynamic within the original length": _rope("dynamic"),
    "llama3": {"rope_parameters": LLAMA3},
    "yarn": _rope("yarn", original_max_position_embeddings=12),
    "yarn with mscale": {"rope_parameters": YARN | {"beta_fast": 8.0, "beta_slow": 2.0}},
}
CASES = _cases()


@dataclass(frozen=True)
class Run:
    """What one forward and backward pass gave."""

    logits: Tensor
    gradients: Tensors


@dataclass(frozen=True)
class Distance:
    """Largest differences from transformers in fp32, relative to the largest value."""

    logits: float
    gradients: float
    """Of any weight's gradient."""
    argmax: float
    """Share of tokens with the same prediction, among those whose two best logits are apart by more than `logits`."""
    decided: float
    """Share of tokens where they are."""


def run_hugging_face(
    network: Any, dtype: torch.dtype, tokens: Tensor, to_megatron: Callable[[Tensors], Tensors]
) -> Run:
    network = network.to(dtype).eval()
    network.zero_grad()
    logits = network(tokens[:, :-1]).logits.float()
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    gradients = {name: torch.zeros_like(x) for name, x in network.state_dict().items()}
    gradients |= {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return Run(logits.detach(), to_megatron({name: x.float() for name, x in gradients.items()}))


def run_ours(model: ModelConfig, precision: Precision, weights: Tensors, tokens: Tensor) -> Run:
    network = our_network(model, precision, weights).eval()
    positions = torch.arange(tokens.shape[1] - 1).expand(tokens.shape[0], -1)
    with torch.no_grad():
        logits = network(tokens[:, :-1], positions, None).float()
    network(tokens[:, :-1], positions, None, labels=tokens[:, 1:]).mean().backward()
    return Run(logits, gradients_by_name(network, model))


def distance(a: Run, exact: Run, rounding: float) -> Distance:
    """How far `a` is from `exact`; `rounding` is what rounding alone can move logits by, in absolute terms."""
    assert a.gradients.keys() == exact.gradients.keys()
    best = exact.logits.topk(2, dim=-1).values
    decided = best[..., 0] - best[..., 1] > 2 * rounding
    same = (a.logits.argmax(-1) == exact.logits.argmax(-1))[decided]
    return Distance(
        relative(a.logits, exact.logits),
        max(relative(a.gradients[n], exact.gradients[n]) for n in exact.gradients),
        float(same.float().mean()),
        float(decided.float().mean()),
    )


def measure(name: str, every: bool) -> dict[str, Distance]:
    """Distances to transformers' fp32 model: ours in fp32, or ours and transformers' own in bf16."""
    split_process_group(ParallelConfig(), RuntimeConfig(device="cpu"))
    seed_everything(0)
    case, sizes = CASES[name], EVERY if every else SIZES
    network = (case.build_every if every else case.build)(sizes)
    randomize(network)
    architecture = architecture_of({"architectures": [case.hf_class]}, source=name)
    model = architecture.model_of(raw_config(network, case.hf_class, sizes), source=name)
    model = replace(model, make_vocab_size_divisible_by=1)
    weights = canonical({n: x.clone() for n, x in network.state_dict().items()}, architecture, model)
    tokens = torch.randint(0, sizes.vocabulary, (2, LENGTH + 1), generator=torch.Generator().manual_seed(1))

    def to_megatron(tensors: Tensors) -> Tensors:
        return canonical(tensors, architecture, model)

    exact = run_hugging_face(network, torch.float32, tokens, to_megatron)
    if not every:
        ours = run_ours(model, Fp32Precision(kind="fp32"), weights, tokens)
        return {"fp32": distance(ours, exact, float((ours.logits - exact.logits).abs().max()))}
    theirs = run_hugging_face(network, torch.bfloat16, tokens, to_megatron)
    rounding = float((theirs.logits - exact.logits).abs().max())
    ours = run_ours(model, Bf16Precision(kind="bf16"), weights, tokens)
    return {
        "bf16": distance(ours, exact, rounding),
        "transformers in bf16": distance(theirs, exact, rounding),
    }


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_are_transformers(name: str, pool: GlooPool) -> None:
    (measured,) = pool.run(1, measure, name, False)
    exact = measured["fp32"]
    print(f"{name}, fp32: logits {exact.logits:.1e}, gradients {exact.gradients:.1e} of their scale")
    # fp32 rounds to 6e-8; two layers of sums of up to 256 terms leave 1e-6 or so.
    assert max(exact.logits, exact.gradients) < 1e-5
    assert exact.argmax == 1.0


@pytest.mark.parametrize("name", CASES)
def test_bf16_is_as_close_as_transformers_is(name: str, pool: GlooPool) -> None:
    (measured,) = pool.run(1, measure, name, True)
    for precision, d in measured.items():
        print(
            f"{name}, {precision}: logits {d.logits:.1e}, gradients {d.gradients:.1e} of their scale, argmax agreement "
            f"{d.argmax:.1%} of the {d.decided:.0%} that rounding leaves open no doubt about"
        )
    ours, theirs = measured["bf16"], measured["transformers in bf16"]
    # As close to the exact result as transformers itself, rounded at other places.
    assert ours.logits < 2 * theirs.logits
    assert ours.gradients < 2 * theirs.gradients
    # Where the two best logits are further apart than twice what rounding moved transformers' own, both agree.
    assert ours.argmax == 1.0
    assert ours.decided > 0.2
