"""What one training step spends its time on: kernels by time and by kind, launches, waits of the host."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

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


@dataclass(frozen=True)
class Kernel:
    """One kernel, or on CPU one operator."""

    milliseconds: float
    count: int
    name: str


@dataclass(frozen=True)
class StepProfile:
    """Of one step."""

    wall_ms: float
    kernels: list[Kernel]
    """The longest first."""
    launches: int
    waits_by_call: dict[str, int]

    @property
    def waits(self) -> int:
        """Times that the host stood still until the device had come so far."""
        return sum(count for call, count in self.waits_by_call.items() if call.endswith("Synchronize"))

    @property
    def busy_ms(self) -> float:
        """All kernels together."""
        return sum(kernel.milliseconds for kernel in self.kernels)

    @property
    def by_kind(self) -> list[tuple[str, float]]:
        """Milliseconds of each kind of kernel, the longest first."""
        kinds: Counter[str] = Counter()
        for kernel in self.kernels:
            kinds[kind_of(kernel.name)] += kernel.milliseconds
        return kinds.most_common()

    def __str__(self) -> str:
        times = f"profiled {self.wall_ms:.0f} ms, device busy {self.busy_ms:.0f} ms"
        return f"{times}, {self.launches} launches, waits {self.waits_by_call}"


def profile_step(step: Callable[[], Any]) -> StepProfile:
    """Run `step` once under the profiler."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    cuda = torch.cuda.is_available()
    # On CUDA its own activity alone: it has launches and waits, and a hundredth of the events to add up.
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        begin = perf_counter()
        step()
        wall = perf_counter() - begin
    kernels, host = _kernels_and_calls(profiler.key_averages(), cuda=cuda)
    waits = {key: host[key] for key in WAITS if host[key]}
    launches = sum(n for key, n in host.items() if "launchkernel" in key.lower())
    return StepProfile(wall * 1e3, kernels, launches, waits)


def _kernels_and_calls(events: Iterable[Any], *, cuda: bool) -> tuple[list[Kernel], Counter[str]]:
    """Every kernel, the longest first; and how often the host called what."""
    kernels, host = [], Counter[str]()
    for event in events:
        is_device = str(getattr(event, "device_type", "")).endswith("CUDA")
        if is_device or not cuda:
            own = event.self_device_time_total if cuda else event.self_cpu_time_total
            kernels.append(Kernel(own / 1e3, event.count, event.key))
        else:
            host[event.key] = event.count
    return sorted(kernels, key=lambda kernel: -kernel.milliseconds), host
