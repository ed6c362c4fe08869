"""Attention over segments against a masked softmax in float64: documents, zigzag chunks, both; what kernels get."""

#   S sequence of all ranks, B rows, N query heads, G key/value heads, D head width

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ext.mcore import attention_segments
from megatron_ext.mcore.attention_segments import attend_segments, find_segments
from megatron_ext.runtime.zigzag import zigzag_slice

SCALE = 0.3
CPU = torch.device("cpu")
S = 384

# Documents that end within, at and across the chunks of 2 and 4 context-parallel ranks (96 and 48 tokens); one row
# has documents of one token, one is a single document.
ROWS: tuple[tuple[int, ...], ...] = ((50, 46, 96, 150, 42), (1, 1, 94, 1, 191, 96), (384,))


def masked_softmax(query_SBND: Tensor, key_SBGD: Tensor, value_SBGD: Tensor, rows: Sequence[Sequence[int]]) -> Tensor:
    """Causal attention within documents, with the whole mask, in float64."""
    share = query_SBND.shape[2] // key_SBGD.shape[2]
    key, value = (x.double().repeat_interleave(share, dim=2) for x in (key_SBGD, value_SBGD))
    scores_BNSS = torch.einsum("sbnd,tbnd->bnst", query_SBND.double(), key) * SCALE
    documents_BS = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in rows])
    same = documents_BS[:, None, :, None] == documents_BS[:, None, None, :]
    hidden = ~(same & torch.ones(S, S, dtype=torch.bool).tril()).to(scores_BNSS.device)
    scores_BNSS = scores_BNSS.masked_fill(hidden, -torch.inf)
    return torch.einsum("bnst,tbnd->sbnd", scores_BNSS.softmax(-1), value).flatten(2)


def tensors(dtype: torch.dtype, groups: int, value_width: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((S, len(ROWS), 4, 16), (S, len(ROWS), groups, 16), (S, len(ROWS), groups, value_width))
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def largest_errors(
    dtype: torch.dtype, size: int, groups: int = 2, value_width: int = 16, device: torch.device = CPU
) -> list[float]:
    """Errors of the context and of each gradient, relative to the largest entry; ranks are computed one by one."""
    inputs = [x.detach().to(device).requires_grad_() for x in tensors(dtype, groups, value_width)]
    expected = masked_softmax(*inputs, ROWS)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    wanted = [expected, *torch.autograd.grad(expected, inputs, upstream.double())]
    query, key, value = inputs
    context, objective = [], torch.zeros((), dtype=torch.float64, device=device)
    for rank in range(size):
        found = find_segments(ROWS, rank, size, device)
        part = attend_segments(zigzag_slice(query, rank, size, 0), key, value, found, SCALE)
        objective = objective + (part.double() * zigzag_slice(upstream, rank, size, 0)).sum()
        context.append((part, zigzag_slice(expected, rank, size, 0)))
    measured = torch.autograd.grad(objective, inputs)
    pairs = [*context, *zip(measured, wanted[1:], strict=True)]
    return [float(((m.double() - w).abs().max() / w.abs().max()).detach()) for m, w in pairs]


# fp32 rounds to 6e-8, and sums over at most 384 keys. bf16 rounds to 4e-3; scores and probabilities of one block are
# rounded once, gradients of keys are summed over several chunks, each rounded.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("size", [1, 2, 4], ids=lambda size: f"CP{size}")
@pytest.mark.parametrize(("groups", "value_width"), [(2, 16), (4, 16), (4, 8)], ids=["gqa", "mha", "narrow values"])
def test_segments_are_the_masked_softmax(
    dtype: torch.dtype, tolerance: float, size: int, groups: int, value_width: int
) -> None:
    errors = largest_errors(dtype, size, groups, value_width)
    print(f"largest relative errors {', '.join(f'{error:.1e}' for error in errors)}")
    assert max(errors) < tolerance


def reference_kernel(
    query_QND: Tensor,
    key_KGD: Tensor,
    value_KGD: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    most_queries: int,
    most_keys: int,
    **options: Any,
) -> Tensor:
    """What torch documents of varlen_attn with a causal window, segment by segment in float64."""
    grouped = (
        {"enable_gqa": query_QND.shape[1] != key_KGD.shape[1]}
        if "enable_gqa" in attention_segments._VARLEN_PARAMETERS
        else {}
    )
    assert options == {"scale": SCALE, "window_size": (-1, 0), **grouped}
    assert (cu_seqlens_q.dtype, cu_seqlens_k.dtype) == (torch.int32, torch.int32)
    assert (most_queries, most_keys) == (int(cu_seqlens_q.diff().max()), int(cu_seqlens_k.diff().max()))
    share = query_QND.shape[1] // key_KGD.shape[1]
    parts = []
    for (q0, q1), (k0, k1) in zip(cu_seqlens_q.unfold(0, 2, 1), cu_seqlens_k.unfold(0, 2, 1), strict=True):
        key, value = (x[k0:k1].double().repeat_interleave(share, dim=1) for x in (key_KGD, value_KGD))
        scores = torch.einsum("qnd,knd->nqk", query_QND[q0:q1].double(), key) * SCALE
        visible = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool).tril(int(k1 - k0 - (q1 - q0)))
        probabilities = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        parts.append(torch.einsum("nqk,knd->qnd", probabilities, value).to(query_QND.dtype))
    return torch.cat(parts)


@pytest.mark.parametrize("knows_groups", [True, False], ids=["enable_gqa", "torch 2.11"])
@pytest.mark.parametrize("size", [1, 2, 4], ids=lambda size: f"CP{size}")
def test_the_cuda_kernel_is_given_the_same_segments(
    size: int, knows_groups: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FlashAttention runs on CUDA only; here its documented meaning, in plain torch, takes its place."""
    parameters = {"scale", "window_size"} | ({"enable_gqa"} if knows_groups else set())
    monkeypatch.setattr(attention_segments, "_VARLEN_PARAMETERS", parameters)
    monkeypatch.setattr(attention_segments, "varlen_attn", reference_kernel)
    monkeypatch.setattr(attention_segments, "_has_kernel", lambda query, value: True)
    assert max(largest_errors(torch.float32, size)) < 2e-6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlashAttention runs on CUDA only")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("size", [1, 2, 4], ids=lambda size: f"CP{size}")
def test_the_cuda_kernel_is_the_masked_softmax(size: int, dtype: torch.dtype) -> None:
    device = torch.device("cuda")
    query, _, value = (x.to(device) for x in tensors(dtype, 2, 16))
    assert attention_segments._has_kernel(query.flatten(0, 1), value.flatten(0, 1))
    assert max(largest_errors(dtype, size, device=device)) < 2e-2


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
