"""Is the torch backend right on this device: idle experts, documents, loss, repeatability, waits of the host?"""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import answers


def part(_: str) -> dict:
    """Right on this device? Errors are ||a - b|| / ||b||, b from float32 or float64 on the CPU."""
    import torch
    import torch.nn.functional as F

    from megatron_ext.mcore.activation import gated_activation
    from megatron_ext.mcore.attention_segments import _VARLEN_IS_COMPLETE, attend_segments, find_segments
    from megatron_ext.mcore.cross_entropy import vocab_parallel_cross_entropy
    from megatron_ext.mcore.moe.grouped_linear import grouped_linear

    where = answers.device()
    results: dict[str, object] = {"varlen_attn takes documents": _VARLEN_IS_COMPLETE}

    def error(a, b) -> float:
        a, b = a.detach().double().cpu(), b.detach().double().cpu()
        return float((a - b).norm() / b.norm().clamp_min(1e-30))

    def compare(name, function, inputs, limit):
        """Outputs and gradients in bf16 here against float32 of the same numbers on the CPU."""
        here = [
            t.to(where).detach().requires_grad_(t.requires_grad) if isinstance(t, torch.Tensor) else t for t in inputs
        ]
        there = [
            t.detach().float().requires_grad_(t.requires_grad)
            if isinstance(t, torch.Tensor) and t.is_floating_point()
            else t
            for t in inputs
        ]
        try:
            out, want = function(*here), function(*there)
            grad = torch.randn(want.shape, generator=torch.Generator().manual_seed(1))
            wanted = [[t for t in side if isinstance(t, torch.Tensor) and t.requires_grad] for side in (here, there)]
            grads = torch.autograd.grad(out, wanted[0], grad.to(where, out.dtype))
            grads_want = torch.autograd.grad(want, wanted[1], grad)
            errors = [error(a, b) for a, b in zip([out, *grads], [want, *grads_want], strict=True)]
            results[name] = {"errors": [f"{e:.1e}" for e in errors], "ok": all(e < limit for e in errors)}
        except Exception as failure:
            results[name] = {"error": f"{type(failure).__name__}: {str(failure).splitlines()[0][:200]}", "ok": False}
        answers.keep(results)
        answers.say(f"{name}: {results[name]}")

    def random(*shape, seed, grad=True):
        x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
        return x.requires_grad_(grad)

    # What the allocator hands out next is not zero: an expert that writes nothing is seen.
    for counts in ([100, 0, 37, 119], [0, 0, 256, 0], [64, 64, 64, 64]):
        if where.type == "cuda":
            poison = [torch.full((4, 384, 256), float("nan"), device=where, dtype=torch.bfloat16) for _ in range(8)]
            del poison
        ends = torch.tensor(counts).cumsum(0).to(torch.int32)
        compare(
            f"grouped experts, rows {counts}",
            lambda x, w, e: grouped_linear(x, w, e.to(x.device)),
            [random(256, 256, seed=1), random(4, 384, 256, seed=2), ends],
            2e-2,
        )
    compare(
        "gated activation",
        lambda p, w: gated_activation(p, F.silu, w),
        [random(512, 512, seed=3), torch.rand(512).requires_grad_()],
        2e-2,
    )
    compare(
        "cross-entropy",
        lambda x, y: vocab_parallel_cross_entropy(x * 1, y.to(x.device), 1000, answers.Group())[0],
        [random(300, 1024, seed=4), torch.randint(0, 1000, (300,), generator=torch.Generator().manual_seed(2))],
        2e-2,
    )
    lengths = ((64, 100, 92), (256,))
    for cp_size, cp_rank in ((1, 0), (2, 1)):
        q = random(256 // cp_size, 2, 8, 64, seed=5)
        compare(
            f"attention within documents, context ranks {cp_size}",
            lambda q, k, v, size=cp_size, rank=cp_rank: attend_segments(
                q, k, v, find_segments(lengths, rank, size, q.device), 0.125
            ),
            [q, random(256, 2, 2, 64, seed=6), random(256, 2, 2, 64, seed=7)],
            2e-2,
        )
    results |= _determinism()
    return results


def _determinism() -> dict:
    """The same four steps of a tiny MoE model, each time from the start, and the waits for the device in a step.

    As it comes, only the first step's loss need repeat (FlashAttention's backward adds in any order); with torch's
    deterministic algorithms all must.
    """
    import torch

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
    import warnings

    import gpu
    import torch

    from megatron_ext.runtime.process_groups import end_process_groups

    peer = next(p for p in gpu.PEERS if p.name == "torch, bf16")
    model = gpu.tiny(gpu.SHAPES["MoE 64 experts top-6, 2 shared"])
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
