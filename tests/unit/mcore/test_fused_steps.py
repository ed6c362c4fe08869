"""Steps that our modules compute with an autograd function of their own, against plain formulas in float64."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.mcore import products
from megatron_ext.mcore.activation import Gate, gated_activation, quick_gelu
from megatron_ext.mcore.moe.grouped_linear import (
    COARSE_STEP,
    FINE_STEP,
    _grouped_kernel,
    _IdleGradient,
    _windows,
    grouped_linear,
)
from megatron_ext.mcore.norm import _CpuRmsNorm

DTYPES = [torch.float32, torch.bfloat16]
# fp32: sums of up to 100 terms with a relative error of 6e-8 each. bf16 keeps 8 bits: each of the two to four rounded
# steps errs by 2^-9 = 2e-3 of a value, against the largest one.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.2e-2}


GPT_OSS = Gate(quick_gelu, limit=0.7, offset=1.0)
"""gpt-oss with a limit that numbers exceed, and none meets: bf16 does not have it."""


def _gpt_oss(gate: Tensor, up: Tensor) -> Tensor:
    """`GptOssExperts` of transformers."""
    gate, up = gate.clamp(max=0.7), up.clamp(min=-0.7, max=0.7)
    return (up + 1) * gate * torch.sigmoid(gate * 1.702)


GATES: dict[str, tuple[Gate, Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (Gate(F.silu), lambda gate, up: F.silu(gate) * up),
    "gelu": (Gate(F.gelu), lambda gate, up: F.gelu(gate) * up),
    "gpt-oss": (GPT_OSS, _gpt_oss),
}


def error(function: Callable[..., Tensor], formula: Callable[..., Tensor], *inputs: Tensor) -> float:
    """Largest error of values and gradients of `function` against `formula` in float64, relative to the largest."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    output, reference = function(*leaves), formula(*exact)
    assert output.dtype == inputs[0].dtype
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(output.dtype)
    measured = (output, *torch.autograd.grad(output, leaves, upstream))
    expected = (reference, *torch.autograd.grad(reference, exact, upstream.double()))
    assert [m.dtype for m in measured[1:]] == [x.dtype for x in inputs]
    return max(float(((m - e).abs().max() / e.abs().max()).detach()) for m, e in zip(measured, expected, strict=True))


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_gated_activation(dtype: torch.dtype, kind: str, weighted: bool) -> None:
    """The limit cuts off a fifth of the gates and half of the others; a cut number has no gradient."""
    gate_kind, exact = GATES[kind]
    weights = (random(3, 5, seed=2).abs(),) if weighted else ()

    def formula(projected: Tensor, *weights: Tensor) -> Tensor:
        gate, up = projected.chunk(2, dim=-1)
        output = exact(gate, up)
        return output * weights[0].unsqueeze(-1) if weights else output

    measured = error(
        lambda projected, *w: gated_activation(projected, gate_kind, *w),
        formula,
        random(3, 5, 64, dtype=dtype),
        *weights,
    )
    print(f"{dtype}: {measured:.1e}")
    assert measured < TOLERANCE[dtype]


def test_gated_activation_keeps_its_input_alone() -> None:
    kept: list[Tensor] = []
    projected = random(4, 16).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        gated_activation(projected, GPT_OSS, random(4))
    assert sum(x.numel() for x in kept) == projected.numel() + 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(dtype: torch.dtype) -> None:
    measured = error(
        lambda x, weight: _CpuRmsNorm.apply(x, weight, 1e-5),
        lambda x, weight: x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight,
        random(4, 7, 48, dtype=dtype),
        1 + random(48, dtype=dtype, seed=2) / 4,
    )
    print(f"{dtype}: {measured:.1e}")
    assert measured < TOLERANCE[dtype]


def looped(tokens: Tensor, weights: Tensor, ends: list[int]) -> Tensor:
    starts = [0, *ends[:-1]]
    return torch.cat([tokens[a:b] @ w.t() for a, b, w in zip(starts, ends, weights, strict=True)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "counts",
    [[64, 32, 96], [5, 70, 33], [0, 40, 0], [100, 3, 2], [1, 0, 0], [31, 33, 1], [300, 5, 333]],
    ids=lambda counts: "-".join(map(str, counts)),
)
@pytest.mark.parametrize("onednn", [False, True], ids=["as torch", "oneDNN"])
def test_grouped_linear(dtype: torch.dtype, counts: list[int], onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_mkl_is_slow", lambda: onednn)
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    measured = error(
        lambda tokens, weights: grouped_linear(tokens, weights, ends),
        lambda tokens, weights: looped(tokens, weights, ends.tolist()),
        random(sum(counts), 24, dtype=dtype),
        random(3, 40, 24, dtype=dtype, seed=2),
    )
    print(f"{dtype} {counts}: {measured:.1e}")
    assert measured < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("onednn", [False, True], ids=["as torch", "oneDNN"])
def test_grouped_gradients_are_added(dtype: torch.dtype, onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the fp32 sum alone, also for an expert without tokens, and those of the tokens are what they were."""
    monkeypatch.setattr(products, "_mkl_is_slow", lambda: onednn)
    ends = torch.tensor([70, 70, 103]).to(torch.int32)
    tokens, weights = random(103, 24, dtype=dtype).requires_grad_(), random(3, 40, 24, dtype=dtype).requires_grad_()
    upstream = random(103, 40, dtype=dtype, seed=1)
    of_tokens, of_weights = torch.autograd.grad(grouped_linear(tokens, weights, ends), (tokens, weights), upstream)
    total = torch.ones(weights.shape)
    grouped_linear(tokens, weights, ends, total).backward(upstream)
    assert weights.grad is None
    assert torch.equal(tokens.grad, of_tokens)
    # fp32 products may be added term by term; those in bf16 are rounded and then added.
    assert torch.allclose(total - 1, of_weights.float(), atol=1e-5 if dtype is torch.float32 else 2e-6, rtol=0)
    assert torch.equal(total[1], torch.ones(40, 24))


@pytest.mark.parametrize("widths", [(24, 40), (23, 40), (24, 37)], ids=["whole", "input", "output"])
def test_grouped_kernel_is_given_whole_16_bytes(widths: tuple[int, int]) -> None:
    """torch has the kernel of CUDA for CPU too: widths that it does not take are filled up, without asking the host."""
    ends = torch.tensor([3, 3, 20]).to(torch.int32)
    measured = error(
        lambda tokens, weights: _grouped_kernel(tokens, weights, ends),
        lambda tokens, weights: looped(tokens, weights, ends.tolist()),
        random(20, widths[0], dtype=torch.bfloat16),
        random(3, widths[1], widths[0], dtype=torch.bfloat16, seed=2),
    )
    assert measured < TOLERANCE[torch.bfloat16]


def test_idle_experts_get_no_gradient_whatever_the_kernel_left_there() -> None:
    weights, ends = random(3, 2, 2).requires_grad_(), torch.tensor([3, 3, 20]).to(torch.int32)
    left = torch.ones(3, 2, 2)
    left[1] = torch.nan
    (gradient,) = torch.autograd.grad(_IdleGradient.apply(weights, ends), weights, left)
    assert gradient.sum(dim=(1, 2)).tolist() == [4, 0, 4]


def test_windows_cover_every_row_last_by_its_own_expert() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        counts = torch.randint(0, 5 * COARSE_STEP, (5,), generator=generator)
        counts //= torch.randint(1, 40, (5,), generator=generator)
        ends = counts.cumsum(0).tolist()
        owner, odd = [-1] * ends[-1], 0
        for expert, start, stop in _windows(ends, compiled=True):
            assert 0 <= start < stop <= ends[-1]
            owner[start:stop] = [expert] * (stop - start)
            odd += (stop - start) % FINE_STEP != 0
        assert owner == [expert for expert, count in enumerate(counts.tolist()) for _ in range(count)]
        # Only experts with fewer rows than a step, that begin within a step of the end, keep a shape of their own.
        assert odd <= sum(0 < c < FINE_STEP and e + FINE_STEP > ends[-1] for c, e in zip(counts, ends, strict=True))
