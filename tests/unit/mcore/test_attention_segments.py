"""Attention over segments against a masked softmax in float64: documents, zigzag chunks, windows, sinks; what kernels
get."""

#   S sequence of all ranks, B rows, N query heads, G key/value heads, D head width

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ext.mcore import attention_segments, attention_sinks
from megatron_ext.mcore.attention_segments import attend_segments, find_segments
from megatron_ext.mcore.attention_sinks import KernelCall
from megatron_ext.runtime.zigzag import zigzag_slice

SCALE = 0.3
CPU = torch.device("cpu")
S = 384

# Documents that end within, at and across the chunks of 2 and 4 context-parallel ranks (96 and 48 tokens); one row
# has documents of one token, one is a single document.
ROWS: tuple[tuple[int, ...], ...] = ((50, 46, 96, 150, 42), (1, 1, 94, 1, 191, 96), (384,))


def masked_softmax(
    query_SBND: Tensor,
    key_SBGD: Tensor,
    value_SBGD: Tensor,
    sinks_N: Tensor | None,
    rows: Sequence[Sequence[int]],
    window: int,
) -> Tensor:
    """Causal attention within documents and windows, with the whole mask and a column of sinks, in float64."""
    share = query_SBND.shape[2] // key_SBGD.shape[2]
    key, value = (x.double().repeat_interleave(share, dim=2) for x in (key_SBGD, value_SBGD))
    scores_BNSS = torch.einsum("sbnd,tbnd->bnst", query_SBND.double(), key) * SCALE
    documents_BS = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in rows])
    same = documents_BS[:, None, :, None] == documents_BS[:, None, None, :]
    near = torch.ones(S, S, dtype=torch.bool).tril().triu(1 - window)
    scores_BNSS = scores_BNSS.masked_fill(~(same & near).to(scores_BNSS.device), -torch.inf)
    if sinks_N is not None:
        column = sinks_N.double()[:, None, None].expand(*scores_BNSS.shape[:3], 1)
        scores_BNSS = torch.cat((scores_BNSS, column), dim=-1)
    return torch.einsum("bnst,tbnd->sbnd", scores_BNSS.softmax(-1)[..., :S], value).flatten(2)


def tensors(dtype: torch.dtype, groups: int, value_width: int, *, sinks: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((S, len(ROWS), 4, 16), (S, len(ROWS), groups, 16), (S, len(ROWS), groups, value_width))
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    drawn += [3 * torch.randn(4, generator=generator)] if sinks else []
    return [x.to(dtype).requires_grad_() for x in drawn]


def largest_errors(
    dtype: torch.dtype,
    size: int,
    groups: int = 2,
    value_width: int = 16,
    window: int | None = None,
    *,
    sinks: bool = False,
    device: torch.device = CPU,
) -> list[float]:
    """Errors of the context and of each gradient, relative to the largest entry; ranks are computed one by one."""
    inputs = [x.detach().to(device).requires_grad_() for x in tensors(dtype, groups, value_width, sinks=sinks)]
    query, key, value, offsets = inputs if sinks else (*inputs, None)
    expected = masked_softmax(query, key, value, offsets, ROWS, window or S)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    wanted = [expected, *torch.autograd.grad(expected, inputs, upstream.double())]
    context, objective = [], torch.zeros((), dtype=torch.float64, device=device)
    for rank in range(size):
        found = find_segments(ROWS, rank, size, device, window)
        part = attend_segments(zigzag_slice(query, rank, size, 0), key, value, found, SCALE, sinks_N=offsets)
        objective = objective + (part.double() * zigzag_slice(upstream, rank, size, 0)).sum()
        context.append((part, zigzag_slice(expected, rank, size, 0)))
    measured = torch.autograd.grad(objective, inputs)
    pairs = [*context, *zip(measured, wanted[1:], strict=True)]
    return [float(((m.double() - w).abs().max() / w.abs().max()).detach()) for m, w in pairs]


KINDS = {
    "gqa": {"groups": 2},
    "mha": {"groups": 4},
    "narrow values": {"groups": 4, "value_width": 8},
    "window": {"window": 70},
    "window of one, sinks": {"window": 1, "sinks": True},
    "window, sinks": {"window": 130, "sinks": True},
    "sinks": {"sinks": True},
}


# fp32 rounds to 6e-8, and sums over at most 384 keys. bf16 rounds to 4e-3; scores and probabilities of one block are
# rounded once, gradients of keys are summed over several chunks, each rounded.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("size", [1, 2, 4], ids=lambda size: f"CP{size}")
@pytest.mark.parametrize("kind", KINDS)
def test_segments_are_the_masked_softmax(dtype: torch.dtype, tolerance: float, size: int, kind: str) -> None:
    errors = largest_errors(dtype, size, **KINDS[kind])
    print(f"largest relative errors {', '.join(f'{error:.1e}' for error in errors)}")
    assert max(errors) < tolerance


def test_sinks_are_exact_in_float64() -> None:
    errors = largest_errors(torch.float64, 2, window=70, sinks=True)
    print(f"largest relative errors {', '.join(f'{error:.1e}' for error in errors)}")
    assert max(errors) < 1e-14


def documented(
    query_QND: Tensor, key_KGD: Tensor, value_KGD: Tensor, call: KernelCall, shift_NQ: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What torch documents of FlashAttention, segment by segment in float64: output [Q, N, D], log-sum-exp [N, Q].

    Args:
        shift_NQ: take this for the log-sum-exp.
    """
    ends = (call.cu_seqlens_q, call.cu_seqlens_k)
    assert all(x.dtype == torch.int32 for x in ends)
    assert (call.most_queries, call.most_keys) == tuple(int(x.diff().max()) for x in ends)
    share, (left, right) = query_QND.shape[1] // key_KGD.shape[1], call.window
    assert right == 0, "causal"
    outputs, sums = [], []
    for (q0, q1), (k0, k1) in zip(*(itertools.pairwise(x.tolist()) for x in ends), strict=True):
        key, value = (x[k0:k1].double().repeat_interleave(share, dim=1) for x in (key_KGD, value_KGD))
        scores = torch.einsum("qnd,knd->nqk", query_QND[q0:q1].double(), key) * call.scale
        last = k1 - k0 - (q1 - q0)
        visible = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool).tril(last)
        visible = visible if left < 0 else visible.triu(last - left)
        scores = scores.masked_fill(~visible, -torch.inf)
        sums.append(scores.logsumexp(-1) if shift_NQ is None else shift_NQ[:, q0:q1].double())
        outputs.append(torch.einsum("nqk,knd->qnd", (scores - sums[-1][..., None]).exp(), value))
    return torch.cat(outputs).to(query_QND.dtype), torch.cat(sums, dim=1)


def public_kernel(
    query_QND: Tensor, key_KGD: Tensor, value_KGD: Tensor, *sizes: Any, scale: float, window_size: Any, **grouped: Any
) -> Tensor:
    """In the place of torch's `varlen_attn`."""
    is_told = "enable_gqa" in attention_segments._VARLEN_PARAMETERS
    assert grouped == ({"enable_gqa": query_QND.shape[1] != key_KGD.shape[1]} if is_told else {})
    return documented(query_QND, key_KGD, value_KGD, KernelCall(*sizes, window_size, scale))[0]


def backward_kernel(
    gradient_QND: Tensor,
    query_QND: Tensor,
    key_KGD: Tensor,
    value_KGD: Tensor,
    output_QND: Tensor,
    sums_NQ: Tensor,
    call: KernelCall,
) -> tuple[Tensor, ...]:
    """In the place of FlashAttention's backward pass, which knows the softmax by its log-sum-exp and output alone.

    With P = exp(S - L): dV = P^T dO and dS = P (dO V^T - rowsum(dO O)), which are the gradients of
    sum(dO P V) for an L that has the gradient rowsum(dO O) through P.
    """
    inputs = [x.detach().double().requires_grad_() for x in (query_QND, key_KGD, value_KGD)]
    with torch.enable_grad():
        outputs, _ = documented(*inputs, call, sums_NQ)
        ones, _ = documented(*inputs[:2], torch.ones_like(inputs[2]), call, sums_NQ)
        given = (gradient_QND * output_QND).double().sum(-1, keepdim=True) / output_QND.shape[-1]
        objective = (outputs * gradient_QND.double()).sum() - (ones * given).sum()
    return tuple(g.to(query_QND.dtype) for g in torch.autograd.grad(objective, inputs))


@pytest.mark.parametrize("knows_groups", [True, False], ids=["enable_gqa", "torch 2.11"])
@pytest.mark.parametrize("size", [1, 2, 4], ids=lambda size: f"CP{size}")
@pytest.mark.parametrize("kind", ["gqa", "window", "window, sinks", "sinks"])
def test_the_cuda_kernel_is_given_the_same_segments(
    size: int, knows_groups: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FlashAttention runs on CUDA only; here its documented meaning, in plain torch, takes its place."""
    parameters = {"scale", "window_size"} | ({"enable_gqa"} if knows_groups else set())
    monkeypatch.setattr(attention_segments, "_VARLEN_PARAMETERS", parameters)
    monkeypatch.setattr(attention_segments, "varlen_attn", public_kernel)
    monkeypatch.setattr(attention_sinks, "flash_forward", documented)
    monkeypatch.setattr(attention_sinks, "flash_backward", backward_kernel)
    monkeypatch.setattr(attention_segments, "_has_kernel", lambda query, value: True)
    assert max(largest_errors(torch.float32, size, **KINDS[kind])) < 2e-6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlashAttention runs on CUDA only")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("size", [1, 2, 4], ids=lambda size: f"CP{size}")
@pytest.mark.parametrize("kind", ["gqa", "window", "window, sinks", "sinks"])
def test_the_cuda_kernel_is_the_masked_softmax(size: int, dtype: torch.dtype, kind: str) -> None:
    device = torch.device("cuda")
    query, _, value = (x.to(device) for x in tensors(dtype, 2, 16))
    assert attention_segments._has_kernel(query.flatten(0, 1), value.flatten(0, 1))
    assert max(largest_errors(dtype, size, device=device, **KINDS[kind])) < 2e-2


def test_segments_of_two_ranks() -> None:
    """Eight tokens, documents of 3 and 5: rank 0 holds tokens 0 1 and 6 7, rank 1 tokens 2 to 5."""
    outer, inner = (find_segments(((3, 5),), rank, 2, CPU) for rank in range(2))
    assert outer.query_lengths == (2, 2)
    assert outer.key_lengths == (2, 5)
    assert outer.key_ranges == ((0, 0, 2), (0, 3, 8))
    assert inner.query_lengths == (1, 1, 2)
    assert inner.key_lengths == (3, 1, 3)
    assert inner.key_ranges == ((0, 0, 4), (0, 3, 6))


def test_whole_rows_need_every_key_before_them() -> None:
    found = find_segments(((16,), (16,)), 1, 2, CPU)
    assert found.key_ranges == ((0, 0, 8), (0, 0, 12), (1, 0, 8), (1, 0, 12))
    assert found.query_lengths == (4, 4, 4, 4)


def test_a_window_needs_no_keys_before_it() -> None:
    """Documents of 3 and 13 on two ranks: each query sees itself and the three tokens before it."""
    outer, inner = (find_segments(((3, 13),), rank, 2, CPU, 4) for rank in range(2))
    assert outer.key_ranges == ((0, 0, 4), (0, 9, 16))
    assert inner.key_ranges == ((0, 3, 8), (0, 5, 12))
    assert (outer.key_lengths, inner.key_lengths) == ((3, 1, 7), (5, 7))
