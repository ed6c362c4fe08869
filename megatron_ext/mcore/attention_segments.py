"""Causal attention over segments: the queries of a rank against just the keys that they may see, without a mask.

A segment is a stretch of one row's queries and a stretch of its keys that ends with them: the last query sees all keys,
the one before it all but the last, and so on. A document is a segment whose queries and keys are the same tokens; a
zigzag chunk of a context-parallel rank is one whose keys begin earlier than its queries; a chunk that documents cut
into pieces is several. So one description covers intra-document attention, context parallelism and both. With a sliding
window a segment has only the keys that its first query sees and those after them.
"""

#   S sequence of the rank, B micro-batch, N query heads, G key/value heads, D head width
#   Q packed queries of the rank (S * B), K packed keys

import contextlib
import functools
import inspect
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from megatron_ext.mcore.attention_sinks import KernelCall, attend_with_sinks, flash_attend_with_sinks, visible_keys
from megatron_ext.runtime.zigzag import zigzag_chunks

# Rows of queries that meet a mask at a time, where a segment has more keys than queries, or a window, and no kernel
# knows that mask.
_MASKED_QUERIES = 128

# torch 2.10 lacks a free scale; there segments are computed one by one. Up to 2.11 FlashAttention takes fewer key heads
# than query heads as they are; from 2.12 on it has to be told.
_VARLEN_PARAMETERS = frozenset(inspect.signature(varlen_attn).parameters)
_VARLEN_IS_COMPLETE = {"scale", "window_size"} <= _VARLEN_PARAMETERS

# cuDNN, scaled_dot_product_attention's first choice on Hopper, builds a graph for each new length, and with a mask
# gives NaN in the queries' gradient at some lengths (pytorch#196678).
_KERNELS_OF_ONE_SEGMENT = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class AttentionSegments:
    """All segments of a micro-batch on one rank, in the order of its packed queries: by row, then by position."""

    key_ranges: tuple[tuple[int, int, int], ...]
    """(row, first, end): keys that are needed, as few contiguous ranges; together they are the packed keys."""
    query_lengths: tuple[int, ...]
    """Queries of each segment. Together they are the packed queries."""
    key_lengths: tuple[int, ...]
    """Keys of each segment. Together they are the packed keys."""
    cu_seqlens_q: Tensor
    """[segments + 1] int32: where each segment begins and ends in the packed queries, for the kernel."""
    cu_seqlens_k: Tensor
    """The same for the packed keys."""
    window: int | None = None
    """Keys that a query sees, its own included; None: all before it."""


# One micro-batch is asked for by every layer, forward and in recompute, while others of the pipeline are in flight.
@functools.lru_cache(maxsize=128)
def find_segments(
    lengths: tuple[tuple[int, ...], ...],
    context_rank: int,
    context_size: int,
    device: torch.device,
    window: int | None = None,
) -> AttentionSegments:
    """The segments of a micro-batch on one context-parallel rank.

    Args:
        lengths: of each row its documents' lengths, in order, over the sequence of all ranks.
        window: how many keys a query sees, its own included.
    """
    found = [
        (row, first, begin if window is None else max(begin, first - window + 1), end)
        for row, documents in enumerate(lengths)
        for first, begin, end in _row_segments(documents, context_rank, context_size)
    ]
    queries = tuple(end - first for _, first, _, end in found)
    keys = tuple(end - begin for _, _, begin, end in found)
    ranges: list[tuple[int, int, int]] = []
    for row, _, begin, end in found:
        if ranges and ranges[-1][0] == row and ranges[-1][2] == begin:
            ranges[-1] = (row, ranges[-1][1], end)
        else:
            ranges.append((row, begin, end))
    return AttentionSegments(tuple(ranges), queries, keys, _ends(queries, device), _ends(keys, device), window)


def _row_segments(documents: Sequence[int], context_rank: int, context_size: int) -> Iterator[tuple[int, int, int]]:
    """Yield (first query, first key, end of both), as positions of the whole row."""
    chunks = zigzag_chunks(context_rank, context_size)
    width = sum(documents) // (len(chunks) * context_size)
    bounds = list(itertools.pairwise(itertools.accumulate(documents, initial=0)))
    for chunk in chunks:
        for begin, end in bounds:
            first, last = max(begin, chunk * width), min(end, (chunk + 1) * width)
            if first < last:
                yield first, begin, last


def _ends(lengths: Sequence[int], device: torch.device) -> Tensor:
    ends = list(itertools.accumulate(lengths, initial=0))
    # From page-locked memory the copy to a GPU does not wait for what the GPU is doing.
    return torch.tensor(ends, dtype=torch.int32, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def attend_segments(
    query_SBND: Tensor,
    key_SBGD: Tensor,
    value_SBGD: Tensor,
    segments: AttentionSegments,
    scale: float,
    dropout: float = 0.0,
    sinks_N: Tensor | None = None,
) -> Tensor:
    """Return the context [S, B, N * Dv] of this rank's queries.

    On CUDA in half precision and without dropout this is one FlashAttention call for all segments; elsewhere each is
    computed by itself.

    Args:
        key_SBGD: keys of the whole sequence, as the values.
        dropout: share of attention weights to drop; not with sinks.
        sinks_N: a logit of each head that joins its softmax (attention_sinks.py).
    """
    assert sinks_N is None or dropout == 0.0, "no weights of a softmax with a sink are dropped"
    seq, batch = query_SBND.shape[:2]
    query_QND = query_SBND.transpose(0, 1).flatten(0, 1)
    key_KGD, value_KGD = (_pack(x, segments.key_ranges) for x in (key_SBGD, value_SBGD))
    if dropout == 0.0 and _has_kernel(query_QND, value_KGD):
        context_QND = _one_call(query_QND, key_KGD, value_KGD, segments, scale, sinks_N)
    else:
        context_QND = _one_by_one(query_QND, key_KGD, value_KGD, segments, scale, dropout, sinks_N)
    return context_QND.view(batch, seq, -1).transpose(0, 1).contiguous()


def _pack(whole_SBGD: Tensor, ranges: Sequence[tuple[int, int, int]]) -> Tensor:
    parts = [whole_SBGD[begin:end, row] for row, begin, end in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _has_kernel(query_QND: Tensor, value_KGD: Tensor) -> bool:
    """Whether FlashAttention takes these tensors: half precision, heads of one width that it knows, Ampere or newer."""
    width = query_QND.shape[-1]
    return (
        _VARLEN_IS_COMPLETE
        and query_QND.is_cuda
        and query_QND.dtype in (torch.float16, torch.bfloat16)
        and width == value_KGD.shape[-1]
        and width % 8 == 0
        and width <= 256
        and torch.cuda.get_device_capability(query_QND.device) >= (8, 0)
    )


def _one_call(
    query_QND: Tensor,
    key_KGD: Tensor,
    value_KGD: Tensor,
    segments: AttentionSegments,
    scale: float,
    sinks_N: Tensor | None,
) -> Tensor:
    # Causal; FlashAttention aligns the last query with the last key, and counts a window without the query's own key.
    window = (-1, 0) if segments.window is None else (segments.window - 1, 0)
    ends = (segments.cu_seqlens_q, segments.cu_seqlens_k)
    most = (max(segments.query_lengths), max(segments.key_lengths))
    if sinks_N is not None:
        return flash_attend_with_sinks(
            query_QND, key_KGD, value_KGD, sinks_N, KernelCall(*ends, *most, window=window, scale=scale)
        )
    grouped: dict[str, Any] = (
        {"enable_gqa": query_QND.shape[1] != key_KGD.shape[1]} if "enable_gqa" in _VARLEN_PARAMETERS else {}
    )
    context_QND = varlen_attn(query_QND, key_KGD, value_KGD, *ends, *most, scale=scale, window_size=window, **grouped)
    assert isinstance(context_QND, Tensor)  # and not with the log-sum-exp, which was not asked for
    return context_QND


def _one_by_one(
    query_QND: Tensor,
    key_KGD: Tensor,
    value_KGD: Tensor,
    segments: AttentionSegments,
    scale: float,
    dropout: float,
    sinks_N: Tensor | None,
) -> Tensor:
    # Split, not sliced: a split's gradient is one concatenation, that of each slice a tensor as large as the whole.
    parts = zip(
        query_QND.split(segments.query_lengths),
        key_KGD.split(segments.key_lengths),
        value_KGD.split(segments.key_lengths),
        strict=True,
    )
    with sdpa_kernel(_KERNELS_OF_ONE_SEGMENT) if query_QND.is_cuda else contextlib.nullcontext():
        return torch.cat([_attend_segment(*part, segments.window, scale, dropout, sinks_N) for part in parts])


def _attend_segment(
    query_QND: Tensor,
    key_KGD: Tensor,
    value_KGD: Tensor,
    window: int | None,
    scale: float,
    dropout: float,
    sinks_N: Tensor | None,
) -> Tensor:
    """Attention of one segment.

    With more keys than queries the mask is a parallelogram, with a window a band, which scaled_dot_product_attention
    takes as a tensor only. It is made for a few queries at a time and the keys that they see, so that its size is
    linear in the sequence.
    """
    queries, keys = query_QND.shape[0], key_KGD.shape[0]
    query, key, value = (x.transpose(0, 1) for x in (query_QND, key_KGD, value_KGD))
    options: dict[str, Any] = {
        "scale": scale,
        "dropout_p": dropout,
        "enable_gqa": query_QND.shape[1] != key_KGD.shape[1],
    }

    def attend(query: Tensor, key: Tensor, value: Tensor, **mask: Any) -> Tensor:
        return F.scaled_dot_product_attention(query[None], key[None], value[None], **mask, **options)[0]

    if queries == keys and sinks_N is None and (window is None or window >= keys):
        return attend(query, key, value, is_causal=True).transpose(0, 1)
    blocks = []
    for first in range(0, queries, _MASKED_QUERIES):
        end = min(first + _MASKED_QUERIES, queries)
        last = keys - queries + end
        begin = 0 if window is None else max(last - (end - first) - window + 1, 0)
        block = (query[:, first:end], key[:, begin:last], value[:, begin:last])
        if sinks_N is None:
            visible = visible_keys(end - first, last - begin, window, query.device)
            blocks.append(attend(*block, attn_mask=visible).transpose(0, 1))
        else:
            blocks.append(attend_with_sinks(*block, sinks_N, window, scale).transpose(0, 1))
    return torch.cat(blocks)
