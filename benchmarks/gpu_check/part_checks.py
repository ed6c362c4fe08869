"""Is the torch backend right on this device: idle experts, documents, loss, repeatability, waits of the host?"""

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import answers
import gpu
import torch
import torch.nn.functional as F
from gpu_shapes import SHAPES, tiny
from torch import Tensor

from megatron_ext.mcore.activation import Gate, gated_activation
from megatron_ext.mcore.attention_segments import _VARLEN_IS_COMPLETE, attend_segments, find_segments
from megatron_ext.mcore.cross_entropy import vocab_parallel_cross_entropy
from megatron_ext.mcore.moe.grouped_linear import grouped_linear
from megatron_ext.runtime.process_groups import end_process_groups

LIMIT = 2e-2
"""Accepted of ||a - b|| / ||b||: bf16 has 8 bits."""


def part(_: str) -> dict:
    """Right on this device? Outputs and gradients in bf16 beside float32 of the same numbers on the CPU."""
    results: dict[str, object] = {"varlen_attn takes documents": _VARLEN_IS_COMPLETE}
    for name, function, inputs in _operations():
        try:
            errors = _errors(function, inputs)
            found = {"errors": [f"{error:.1e}" for error in errors], "ok": all(error < LIMIT for error in errors)}
        except Exception as failure:
            found = {"error": f"{type(failure).__name__}: {str(failure).splitlines()[0][:200]}", "ok": False}
        results[name] = found
        answers.keep(results)
        answers.say(f"{name}: {found}")
    return results | _determinism()


def _operations() -> list[tuple[str, Callable[..., Tensor], Sequence[Tensor]]]:
    """Each with its name and inputs, on the CPU."""
    rows, experts = _random(256, 256, seed=1), _random(4, 384, 256, seed=2)
    routed = [
        (f"grouped experts, rows {counts}", _grouped, (rows, experts, torch.tensor(counts).cumsum(0).to(torch.int32)))
        for counts in ([100, 0, 37, 119], [0, 0, 256, 0], [64, 64, 64, 64])
    ]
    gated = (_random(512, 512, seed=3), torch.rand(512).requires_grad_())
    labels = torch.randint(0, 1000, (300,), generator=torch.Generator().manual_seed(2))
    keys, values = _random(256, 2, 2, 64, seed=6), _random(256, 2, 2, 64, seed=7)
    documents = [
        (
            f"attention within documents, context ranks {size}",
            lambda q, k, v, size=size, rank=rank: _within_documents(q, k, v, rank, size),
            (_random(256 // size, 2, 8, 64, seed=5), keys, values),
        )
        for size, rank in ((1, 0), (2, 1))
    ]
    return [
        *routed,
        ("gated activation", lambda p, w: gated_activation(p, Gate(F.silu), w), gated),
        ("cross-entropy", _cross_entropy, (_random(300, 1024, seed=4), labels)),
        *documents,
    ]


def _grouped(rows: Tensor, experts: Tensor, ends: Tensor) -> Tensor:
    if rows.is_cuda:
        # What the allocator hands out next is not zero: an expert that writes nothing is seen.
        poison = [torch.full_like(experts, float("nan"), dtype=torch.bfloat16) for _ in range(8)]
        del poison
    return grouped_linear(rows, experts, ends)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return vocab_parallel_cross_entropy(logits * 1, labels, 1000, answers.Group())[0]


def _within_documents(q: Tensor, k: Tensor, v: Tensor, rank: int, size: int) -> Tensor:
    lengths = ((64, 100, 92), (256,))
    return attend_segments(q, k, v, find_segments(lengths, rank, size, q.device), 0.125)


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16().requires_grad_()


def _errors(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[float]:
    """||a - b|| / ||b|| of the output and of each gradient."""
    here = [tensor.to(answers.device()).detach().requires_grad_(tensor.requires_grad) for tensor in inputs]
    there = [
        tensor.detach().float().requires_grad_(tensor.requires_grad) if tensor.is_floating_point() else tensor
        for tensor in inputs
    ]
    out, want = function(*here), function(*there)
    grad = torch.randn(want.shape, generator=torch.Generator().manual_seed(1))
    leaves = [[tensor for tensor in side if tensor.requires_grad] for side in (here, there)]
    grads = torch.autograd.grad(out, leaves[0], grad.to(out))
    grads_want = torch.autograd.grad(want, leaves[1], grad)
    return [_error(a, b) for a, b in zip([out, *grads], [want, *grads_want], strict=True)]


def _error(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def _determinism() -> dict:
    """The same four steps of a tiny MoE model, each time from the start, and the waits for the device in a step.

    As it comes, only the first step's loss need repeat (FlashAttention's backward adds in any order); with torch's
    deterministic algorithms all must.
    """
    found: dict[str, object] = {}
    for mode in ("as it comes", "deterministic"):
        torch.use_deterministic_algorithms(mode == "deterministic")  # FlashAttention obeys it only where it may raise
        try:
            (first, waits), (second, _) = _steps_and_waits(), _steps_and_waits()
        except RuntimeError as error:
            found[f"determinism, {mode}"] = {"error": str(error).splitlines()[0][:200], "ok": False}
            continue
        repeats = first == second if mode == "deterministic" else first[0] == second[0]
        found[f"determinism, {mode}"] = {"losses": [first, second], "all equal": first == second, "ok": repeats}
        if mode == "as it comes":
            found["waits for the device in one MoE step (4 micro-batches, 2 layers)"] = waits
        answers.say(f"{mode}: {found[f'determinism, {mode}']}, {waits}")
        answers.keep(found)
    torch.use_deterministic_algorithms(False)
    return found


def _steps_and_waits() -> tuple[list[float], dict[str, int]]:
    """Losses of four steps from the start, and where the host waits for the device in a fifth."""
    peer = next(p for p in gpu.PEERS if p.name == "torch, bf16")
    model = tiny(SHAPES["MoE 64 experts top-6, 2 shared"])
    waits: Counter = Counter()
    if torch.cuda.is_available():
        model = replace(model, hidden_size=512, num_attention_heads=8, num_query_groups=8, moe_ffn_hidden_size=256)
    step = gpu._build(peer, model, 64 if answers.TINY else 512)
    losses = [step() for _ in range(4)]
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
        torch.cuda.set_sync_debug_mode("default")
        for warning in caught:
            if "synchroniz" in str(warning.message):
                waits[f"{Path(warning.filename).name}:{warning.lineno}"] += 1
    end_process_groups()
    return losses, dict(waits.most_common(15))
