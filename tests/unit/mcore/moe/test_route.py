"""What follows from a router's logits as one compiled graph: for every kind of router, beside the steps of torch."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ext.config import GatingNormalization, ModelConfig
from megatron_ext.mcore.moe import route as routing
from megatron_ext.mcore.moe.route import Routed, route
from megatron_ext.testing.tiny import tiny_model

TOKENS, EXPERTS = 256, 16
PLAIN: dict[str, Any] = {"moe_gating_normalization": None}
GROUPS: dict[str, Any] = {"moe_router_num_groups": 4, "moe_router_group_topk": 2}
SIGMOID: dict[str, Any] = {"moe_router_score_function": "sigmoid", "moe_router_topk_scaling_factor": 2.5}


def moe(**fields: Any) -> ModelConfig:
    return tiny_model(moe=True, num_moe_experts=EXPERTS, moe_router_topk=4, **fields)


KINDS: dict[str, ModelConfig] = {
    "Mixtral's": moe(**PLAIN),
    "Skywork's, z-loss": moe(moe_z_loss_coeff=1e-3),
    "Skywork's by the whole deviation": moe(moe_gating_normalization=GatingNormalization(scale=2.0, correction=0)),
    "Qwen2's": moe(**PLAIN, moe_router_pre_softmax=True),
    "Qwen3's": moe(**PLAIN, moe_router_pre_softmax=True, moe_router_norm_topk_prob=True),
    "DeepSeek-V2's": moe(**PLAIN, **GROUPS, moe_router_pre_softmax=True, moe_router_group_score="max"),
    "DeepSeek-V3's": moe(**PLAIN, **GROUPS, **SIGMOID, moe_router_enable_expert_bias=True),
    "sigmoid": moe(**SIGMOID, moe_router_norm_topk_prob=False),
}
COMPILED = ("Skywork's, z-loss", "Qwen3's", "DeepSeek-V3's")
"""Each step of the others is in one of these."""


@pytest.fixture(autouse=True)
def _forget_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    routing._compiled.cache_clear()
    yield
    torch._dynamo.reset()
    routing._compiled.cache_clear()


def trained(function: Callable[..., Routed], model: ModelConfig, tokens: int, noisy: bool) -> dict[str, Tensor]:
    """What `function` returns for random logits, and the gradient of all that has one."""
    generator = torch.Generator().manual_seed(tokens)
    raw, noise = torch.randn(2, tokens, EXPERTS, generator=generator)
    raw.requires_grad_()
    bias = torch.linspace(0.0, 0.1, EXPERTS) if model.moe_router_enable_expert_bias else None
    routed = function(raw, noise if noisy else None, bias, model, 2, learns=True, balances=True)
    found = {name: value for name, value in routed._asdict().items() if value is not None}
    learned = [value for value in found.values() if value.requires_grad]
    upstream = [torch.randn(value.shape, generator=generator) for value in learned]
    (found["gradient"],) = torch.autograd.grad(learned, raw, upstream)
    return {name: value.detach() for name, value in found.items()}


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.parametrize(("kind", "noisy"), [(kind, number % 2 == 0) for number, kind in enumerate(KINDS)])
def test_every_router_is_one_graph(kind: str, noisy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read from the device, a shape that depends on numbers or a branch on them would end the trace."""
    one_graph = torch.compile(route, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(routing, "_compiled", lambda: one_graph)
    before = graphs()
    for tokens in (48, 80, 7):
        measured = trained(routing.route_in_one_graph, KINDS[kind], tokens, noisy)
        expected = trained(route, KINDS[kind], tokens, noisy)
        assert measured.keys() == expected.keys()
        # The same steps of torch, forward and backward, in the same order.
        assert [name for name in expected if not torch.equal(measured[name], expected[name])] == []
    assert graphs() - before == 1, "one for any number of tokens"


class Launches(TorchDispatchMode):
    """Counts operations that compute: on a GPU each is a kernel or more."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


_KERNEL = re.compile(r"^ *(?:cpp_fused\w*|buf\d+ = torch\.ops\.aten\.[\w.]+)\(", re.MULTILINE)


@pytest.mark.parametrize("kind", COMPILED)
def test_the_compiled_router_is_the_router_in_few_kernels(kind: str) -> None:
    from torch._inductor.utils import run_and_get_code  # imports the compiler

    with Launches() as launches:
        expected = trained(route, KINDS[kind], 48, noisy=False)
    # As under runtime.deterministic, which the compiler asks for.
    torch.use_deterministic_algorithms(mode=True)
    try:
        measured, sources = run_and_get_code(trained, routing.route_in_one_graph, KINDS[kind], 48, noisy=False)
    finally:
        torch.use_deterministic_algorithms(mode=False)
    kernels = sum(len(_KERNEL.findall(source)) for source in sources)
    print(f"{kind}: {launches.count} operations forward and backward, {kernels} kernels")
    assert 3 <= kernels < launches.count / 3
    exact = {"chosen_TE", "balanced_TE", "load_E"} & expected.keys()
    assert all(torch.equal(measured[name], expected[name]) for name in exact)
    errors = {
        name: float((measured[name] - expected[name]).abs().max() / expected[name].abs().max())
        for name in expected.keys() - exact
    }
    print({name: f"{error:.0e}" for name, error in errors.items()})
    # fp32: exponentials of another library, and sums over 16 experts or 48 tokens in another order: a few roundings
    # of 6e-8 each.
    assert max(errors.values()) < 1e-6


def kept(function: Callable[..., Routed], model: ModelConfig) -> int:
    """Bytes that `function` keeps for its backward pass."""
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    logits = 1 * torch.randn(TOKENS, EXPERTS, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        function(logits, None, torch.zeros(EXPERTS), model, 1, learns=True, balances=True)
    return sum(storages.values())


@pytest.mark.parametrize("kind", COMPILED)
def test_one_graph_keeps_one_tensor_more_at_most(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As plans have it: which tensors the backward pass gets is the compiler's own choice."""
    one_graph = torch.compile(route, fullgraph=True, backend="aot_eager_decomp_partition")
    monkeypatch.setattr(routing, "_compiled", lambda: one_graph)
    steps, graph = kept(route, KINDS[kind]), kept(routing.route_in_one_graph, KINDS[kind])
    print(f"{kind}: {graph} bytes in place of {steps}")
    assert 0 < graph <= steps + 4 * TOKENS * EXPERTS
