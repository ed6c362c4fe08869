"""Grouped experts against one expert after the other in float64, outputs and gradients, also with idle experts."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.config import Fp32Precision, ParallelConfig, RecomputeConfig, RuntimeConfig
from megatron_ext.mcore.moe.experts import GroupedExperts, bias_of_rows
from megatron_ext.mcore.moe.grouped_linear import grouped_linear
from megatron_ext.mcore.transformer_config import transformer_config
from megatron_ext.runtime.process_groups import split_process_group
from megatron_ext.runtime.seeds import seed_everything
from megatron_ext.testing.pool import GlooPool
from megatron_ext.testing.tiny import tiny_model

KINDS = {
    "SwiGLU": {},
    "biases": {"add_bias_linear": True},
    "GELU with biases": {"gated_linear_unit": False, "activation_func": "gelu", "add_bias_linear": True},
}
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu}


def build(width: int, kind: str = "SwiGLU") -> GroupedExperts:
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    split_process_group(ParallelConfig(), RuntimeConfig(device="cpu"))
    seed_everything(0)
    model = tiny_model(moe=True, moe_ffn_hidden_size=width, **KINDS[kind])
    config = transformer_config(model, ParallelConfig(), Fp32Precision(kind="fp32"), RecomputeConfig())
    with torch.device("cpu"):
        experts = GroupedExperts(4, config, pg_collection=get_default_pg_collection())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in experts.parameters():
            weight.normal_(0, 0.1, generator=generator)
    return experts


def one_expert(x: Tensor, parameters: dict[str, Tensor], e: int, kind: str) -> Tensor:
    """The output of expert `e` as a feed-forward network by itself."""
    fields = {"gated_linear_unit": True, "activation_func": "silu", "add_bias_linear": False} | KINDS[kind]
    activation, biases = ACTIVATIONS[fields["activation_func"]], fields["add_bias_linear"]
    hidden = F.linear(x, parameters["weight1"][e], parameters["bias1"].chunk(4)[e] if biases else None)
    if fields["gated_linear_unit"]:
        gate, up = hidden.chunk(2, dim=-1)
        hidden = activation(gate) * up
    else:
        hidden = activation(hidden)
    return F.linear(hidden, parameters["weight2"][e], parameters["bias2"].chunk(4)[e] if biases else None)


def errors(width: int, counts: list[int], kind: str) -> dict[str, float]:
    """Largest relative error of outputs and gradients against float64."""
    experts = build(width, kind)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(sum(counts), 64, generator=generator).requires_grad_()
    weights = torch.rand(sum(counts), generator=generator).requires_grad_()
    upstream = torch.randn(sum(counts), 64, generator=generator)
    inputs = {"tokens": tokens, "weights": weights, **dict(experts.named_parameters())}
    output, bias = experts(tokens, torch.tensor(counts), weights)
    assert bias is None
    measured = (output, *torch.autograd.grad(output, list(inputs.values()), upstream))
    exact = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    parts = [
        one_expert(x, exact, e, kind) * w[:, None]
        for e, (x, w) in enumerate(zip(exact["tokens"].split(counts), exact["weights"].split(counts), strict=True))
    ]
    reference = torch.cat(parts)
    expected = (reference, *torch.autograd.grad(reference, list(exact.values()), upstream.double()))
    return {
        n: float((m - e).abs().max() / (e.abs().max() + 1e-30))
        for n, m, e in zip(("output", *inputs), measured, expected, strict=True)
    }


@pytest.mark.parametrize("width", [48, 41], ids=["grouped kernel", "unaligned"])
@pytest.mark.parametrize("counts", [[5, 9, 3, 7], [0, 11, 0, 1]], ids=["busy", "idle"])
@pytest.mark.parametrize("kind", KINDS)
def test_experts_equal_float64(width: int, counts: list[int], kind: str, pool: GlooPool) -> None:
    (measured,) = pool.run(1, errors, width, counts, kind)
    print(measured)
    # fp32 sums over up to 64 products: 64 * 6e-8 at worst.
    assert max(measured.values()) < 4e-6


def gradients_without_tokens() -> list[float]:
    experts = build(48, "biases")
    tokens, weights = torch.zeros(0, 64, requires_grad=True), torch.zeros(0, requires_grad=True)
    output, _ = experts(tokens, torch.zeros(4, dtype=torch.long), weights)
    assert output.shape == (0, 64)
    output.sum().backward()
    return [float(w.grad.abs().sum()) for w in experts.parameters()]


def test_a_rank_without_tokens_still_has_gradients(pool: GlooPool) -> None:
    """Gradient reduction waits for every parameter; zeros must come, not nothing."""
    assert pool.run(1, gradients_without_tokens) == [[0.0] * 4]


@pytest.mark.parametrize("width", [12, 11], ids=["grouped", "rows that the grouped kernel refuses"])
def test_the_expert_product_is_one_product_an_expert(width: int) -> None:
    tokens, weights = torch.randn(10, 8), torch.randn(3, width, 8)
    counts = [4, 0, 6]
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    looped = torch.cat([p @ w.t() for p, w in zip(tokens.split(counts), weights, strict=True)])
    assert torch.allclose(grouped_linear(tokens, weights, ends), looped, atol=1e-6)


def test_the_gradient_of_a_bias_is_added_up_in_fp32() -> None:
    counts_E, generator = torch.tensor([3000, 0, 7, 1089]), torch.Generator().manual_seed(0)
    bias_EO = torch.randn(4, 6, generator=generator).bfloat16().requires_grad_()
    grad_TO = torch.rand(4096, 6, generator=generator).bfloat16()
    rows_TO = bias_of_rows(bias_EO, counts_E, 4096)
    assert torch.equal(rows_TO, bias_EO.repeat_interleave(counts_E, dim=0))
    rows_TO.backward(grad_TO)
    assert bias_EO.grad is not None
    # One after the other in bf16 the 3000 numbers of about a half would come to 128 or 256.
    expected_EO = torch.stack([part.double().sum(0) for part in grad_TO.split(counts_E.tolist())])
    assert torch.equal(bias_EO.grad, expected_EO.to(torch.bfloat16))
