"""Training steps of benchmarks/gpu.py: timed, then one profiled."""

import statistics
import time
from collections import Counter

import answers
import gpu
import torch
from torch.profiler import ProfilerActivity, profile

from megatron_ext.canonical.counts import count_parameters
from megatron_ext.planning.flops import training_flops_per_token


def part(which: str) -> dict:
    """One shape and peer of benchmarks/gpu.py: timed, then a step profiled."""
    shape, wanted = which.split("|")
    name, model = next((n, m) for n, m in gpu.SHAPES.items() if shape in n)
    peer = next(p for p in gpu.PEERS if p.name == wanted)
    cuda = torch.cuda.is_available()
    if answers.TINY:
        model, length = gpu.tiny(model), 64
    else:
        memory = torch.cuda.get_device_properties(0).total_memory
        model, length = gpu.with_layers_that_fit(model, memory), gpu.LENGTH
    start = time.perf_counter()
    step = gpu._build(peer, model, length)
    built = time.perf_counter()
    first = step()
    warm = time.perf_counter()
    for _ in range(2):
        step()
    seconds = []
    while len(seconds) < 6 and (len(seconds) < 2 or sum(seconds) < 8):
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    tokens = gpu.MICRO_BATCHES * gpu.MICRO_BATCH * length
    flops = training_flops_per_token(model, length) * tokens
    median = statistics.median(seconds)
    parameters = count_parameters(model)
    result = {
        "layers": model.num_layers,
        "parameters, 1e9": round(parameters.total / 1e9, 3),
        "active, 1e9": round(parameters.active / 1e9, 3),
        "seconds a step": [round(s, 4) for s in seconds],
        "TFLOP/s": round(flops / median / 1e12, 1),
        "tokens/s": round(tokens / median),
        "peak GiB": round(torch.cuda.max_memory_allocated() / 2**30, 1) if cuda else None,
        "first loss": first,
        "build s": round(built - start, 1),
        "first step s": round(warm - built, 1),
    }
    answers.say(f"{name}, {peer.name}: {result}")
    answers.keep(result)
    result["profile"] = _profile(step, f"{name}, {peer.name}, {median * 1e3:.0f} ms a step")
    return result


KINDS = {
    "matrix products": ("gemm", "cutlass", "nvjet", "xmma", "cublas", "sm90_", "device_kernel"),
    "attention": ("flash", "sdpa", "fmha", "cudnn_generated", "bprop"),
    "index, gather, scatter, sort": (
        "index",
        "gather",
        "scatter",
        "sort",
        "topk",
        "nonzero",
        "scan",
        "searchsorted",
        "unique",
    ),
    "optimizer": ("adam", "multi_tensor"),
    "norm": ("norm",),
    "reductions": ("reduce", "softmax"),
    "copies and casts": ("copy", "memcpy", "memset", "fill", "cat", "transpose"),
    "elementwise": ("elementwise", "triton"),
}


WAITS = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "aten::_local_scalar_dense",
    "cudaMemcpyAsync",
)


def kind_of(kernel: str) -> str:
    """What a kernel of this name computes."""
    lowered = kernel.lower()
    order = [
        "attention",
        "matrix products",
        "optimizer",
        "index, gather, scatter, sort",
        "norm",
        "reductions",
        "copies and casts",
    ]
    return next((k for k in [*order, "elementwise"] if any(text in lowered for text in KINDS[k])), "other")


def _profile(step, title: str) -> dict:
    """Kernels of one step by time and kind, launches, waits; the table is appended to profile.txt."""
    cuda = torch.cuda.is_available()
    # On CUDA its own activity alone: it has launches and waits, and a hundredth of the events to add up.
    activities = [ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        begin = time.perf_counter()
        step()
        wall = time.perf_counter() - begin
    kernels, host = _kernels_and_calls(profiler.key_averages(), cuda=cuda)
    kinds: Counter = Counter()
    for ms, _, key in kernels:
        kinds[kind_of(key)] += ms
    busy = sum(kinds.values())
    waits = {key: host[key] for key in WAITS if host[key]}
    launches = sum(n for key, n in host.items() if "launchkernel" in key.lower())
    lines = [f"== {title}; profiled {wall * 1e3:.0f} ms, device busy {busy:.0f} ms, {launches} launches, waits {waits}"]
    lines += [f"  {ms:9.2f} ms {ms / busy:6.1%} {kind}" for kind, ms in kinds.most_common()]
    lines += [f"  {ms:9.2f} ms x{count:<6d} {key[:150]}" for ms, count, key in kernels[:40]]
    with (answers.OUT / "profile.txt").open("a") as file:
        file.write("\n".join(lines) + "\n\n")
    for line in lines[: 1 + len(kinds) + 12]:
        answers.say(line[:170])
    return {
        "profiled ms": round(wall * 1e3, 1),
        "device busy ms": round(busy, 1),
        "launches": launches,
        "waits": waits,
        "ms by kind": {k: round(ms, 2) for k, ms in kinds.most_common()},
        "top": [[round(ms, 3), count, key[:110]] for ms, count, key in kernels[:25]],
    }


def _kernels_and_calls(events, *, cuda: bool) -> tuple[list[tuple[float, int, str]], Counter]:
    """Milliseconds, count and name of every kernel, longest first; and how often the host called what."""
    kernels, host = [], Counter()
    for event in events:
        is_device = str(getattr(event, "device_type", "")).endswith("CUDA")
        if is_device or not cuda:
            own = event.self_device_time_total if cuda else event.self_cpu_time_total
            kernels.append((own / 1e3, event.count, event.key))
        else:
            host[event.key] = event.count
    return sorted(kernels, reverse=True), host
