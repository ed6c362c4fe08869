"""Training steps of benchmarks/gpu.py: timed, then one profiled."""

import statistics
import time
from typing import Any

import answers
import gpu
import torch
from gpu_profile import profile_step
from gpu_shapes import LENGTH, MICRO_BATCH, MICRO_BATCHES, SHAPES, tiny, with_layers_that_fit

from megatron_ext.canonical.counts import count_parameters
from megatron_ext.planning.flops import training_flops_per_token


def part(which: str) -> dict:
    """One shape and peer of benchmarks/gpu.py: timed, then a step profiled."""
    shape, wanted = which.split("|")
    name, model = next((n, m) for n, m in SHAPES.items() if shape in n)
    peer = next(p for p in gpu.PEERS if p.name == wanted)
    cuda = torch.cuda.is_available()
    if answers.TINY:
        model, length = tiny(model), 64
    else:
        memory = torch.cuda.get_device_properties(0).total_memory
        model, length = with_layers_that_fit(model, memory), LENGTH
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
    tokens = MICRO_BATCHES * MICRO_BATCH * length
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


def _profile(step: Any, title: str) -> dict[str, Any]:
    """Kernels of one step by time and kind, launches, waits; the table is appended to profile.txt."""
    found = profile_step(step)
    busy = found.busy_ms
    lines = [f"== {title}; {found}"]
    lines += [f"  {ms:9.2f} ms {ms / busy:6.1%} {kind}" for kind, ms in found.by_kind]
    lines += [f"  {one.milliseconds:9.2f} ms x{one.count:<6d} {one.name[:150]}" for one in found.kernels[:40]]
    with (answers.OUT / "profile.txt").open("a") as file:
        file.write("\n".join(lines) + "\n\n")
    for line in lines[: 1 + len(found.by_kind) + 12]:
        answers.say(line[:170])
    return {
        "profiled ms": round(found.wall_ms, 1),
        "device busy ms": round(busy, 1),
        "launches": found.launches,
        "waits": found.waits_by_call,
        "ms by kind": {kind: round(ms, 2) for kind, ms in found.by_kind},
        "top": [[round(one.milliseconds, 3), one.count, one.name[:110]] for one in found.kernels[:25]],
    }
