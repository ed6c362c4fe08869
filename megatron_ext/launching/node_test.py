"""Tests the nodes of a run before it starts: each rank measures what is its own, and with the groups of the layout."""

import contextlib
import hashlib
import os
import socket
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from megatron_ext.config import RunConfig, dump_yaml, to_mapping
from megatron_ext.data.dataset import dataset_fingerprint
from megatron_ext.errors import DataError, EnvironmentFault
from megatron_ext.launching.node_report import Link, RankReport
from megatron_ext.runtime import accelerators
from megatron_ext.runtime.installation import installation
from megatron_ext.runtime.liveness import Liveness
from megatron_ext.runtime.process_groups import groups_by_kind

_REPEATS = 3
"""Each rate is the best of so many: what else a machine does makes it slower, and nothing faster."""


def measure_all(run: RunConfig, device: torch.device, others: Liveness) -> list[RankReport]:
    """What all ranks find, by rank. Every rank calls it, after `split_process_group`.

    Args:
        others: names a rank that dies meanwhile, or does not come to the end, and ends all.

    Raises:
        EnvironmentFault: this rank could not be tested to the end.
    """
    with others.step():
        try:
            reports: list[RankReport] = [None] * dist.get_world_size()  # type: ignore[list-item]
            dist.all_gather_object(reports, measure_node(run, device))
        except RuntimeError as error:
            others.end_if_missing()
            place, why = f"rank {dist.get_rank()} on {socket.gethostname()}", " ".join(str(error).split())
            raise EnvironmentFault(f"the test of the nodes did not come to its end: {place}: {why}") from error
    return reports


def measure_node(run: RunConfig, device: torch.device) -> RankReport:
    """What this rank finds. Every rank calls it, after `split_process_group`."""
    on_gpu = device.type == "cuda"
    # Before anything is allocated here. Of a GPU, its own; of a CPU, what all ranks of the host share.
    free, total = torch.cuda.mem_get_info(device) if on_gpu else _host_memory()
    faults: list[str] = []
    same = {
        **_installation(run, faults),
        "configuration": _digest(dump_yaml(to_mapping(run))),
        "data": _data(run, faults),
    }
    product = _product_rate(device)
    health = _gpu_health(device, faults) if on_gpu else ""
    links = {}
    for kind, group in groups_by_kind().items():
        ranks = tuple(dist.get_process_group_ranks(group))
        links[kind] = Link(ranks, (_neighbour_rate if kind == "PP" else _all_reduce_rate)(group, device))
    return RankReport(
        rank=dist.get_rank(),
        host=socket.gethostname(),
        device=f"cuda:{device.index} {torch.cuda.get_device_name(device)}" if on_gpu else "cpu",
        same=same,
        clock=_clock(device),
        memory_free=free,
        memory_total=total,
        product=product,
        disk=_disk_rate(Path(run.checkpoint.directory), on_gpu, faults),
        links=links,
        health=health,
        faults=faults,
    )


def _installation(run: RunConfig, faults: list[str]) -> dict[str, str]:
    """What the run computes and sends with; a fault where it cannot be used here."""
    flex = run.parallel.flex_backend
    try:
        accelerators.require(run.runtime, run.precision, has_experts=run.model.is_moe, flex=flex)
    except EnvironmentFault as fault:
        faults.append(str(fault))
    return installation() | ({"deep_ep": str(accelerators.installed("deep_ep"))} if flex else {})


def _host_memory() -> tuple[int, int]:
    memory = psutil.virtual_memory()
    return memory.available, memory.total


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _data(run: RunConfig, faults: list[str]) -> str:
    """Of each source what it was prepared as, and how large its file is here."""
    data = run.data
    paths = [source.path for source in (*data.train, *data.validation)]
    paths += [source.path for source in data.sources.values()]
    known = []
    for path in paths:
        try:
            known.append(f"{dataset_fingerprint(path)} {Path(f'{path}.bin').stat().st_size}")
        except (DataError, OSError) as error:
            faults.append(f"data {path}: {error}")
    return _digest("\n".join(known))


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    """The shortest time of `work`, after one that warms up."""
    best = float("inf")
    for _ in range(_REPEATS + 1):
        _wait(device)
        begun = time.perf_counter()
        work()
        _wait(device)
        best = min(best, time.perf_counter() - begun)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _product_rate(device: torch.device) -> float:
    """FLOP/s of products that a training step is made of, while all other ranks multiply too."""
    width, times = (8192, 20) if device.type == "cuda" else (512, 4)
    matrix = torch.ones(width, width, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    matrix.normal_()

    def multiply() -> None:
        for _ in range(times):
            torch.mm(matrix, matrix)

    dist.barrier()
    return 2.0 * width**3 * times / _seconds(multiply, device)


def _buffer(device: torch.device) -> torch.Tensor:
    return torch.ones((64 if device.type == "cuda" else 1) * 2**20, device=device)


def _all_reduce_rate(group: dist.ProcessGroup, device: torch.device) -> float:
    """Bytes a second that each rank sends in an all-reduce, while the other groups of the kind do the same."""
    buffer = _buffer(device)
    dist.barrier()
    seconds = _seconds(lambda: _reduce(buffer, group), device)
    return 2 * (group.size() - 1) / group.size() * buffer.nbytes / seconds


def _reduce(buffer: torch.Tensor, group: dist.ProcessGroup) -> None:
    dist.all_reduce(buffer, op=dist.ReduceOp.MAX, group=group)


def _neighbour_rate(group: dist.ProcessGroup, device: torch.device) -> float:
    """Bytes a second from each stage to the next, the last one to the first."""
    ranks, here = dist.get_process_group_ranks(group), group.rank()
    sent, received = _buffer(device), _buffer(device)
    following, before = ranks[(here + 1) % len(ranks)], ranks[here - 1]

    def pass_on() -> None:
        sending = dist.P2POp(dist.isend, sent, following, group)
        receiving = dist.P2POp(dist.irecv, received, before, group)
        for work in dist.batch_isend_irecv([sending, receiving]):
            work.wait()

    dist.barrier()
    return sent.nbytes / _seconds(pass_on, device)


def _clock(device: torch.device) -> float:
    """Seconds that this host's clock is ahead of the median: the least of several looks, each after a meeting."""
    ahead = []
    for _ in range(_REPEATS):
        dist.barrier()
        now = torch.tensor([time.time()], dtype=torch.float64, device=device)
        times = [torch.zeros_like(now) for _ in range(dist.get_world_size())]
        dist.all_gather(times, now)
        ahead.append(float(now) - statistics.median(map(float, times)))
    return min(ahead, key=abs)


def _disk_rate(directory: Path, on_gpu: bool, faults: list[str]) -> float | None:
    """Bytes a second that one rank a host writes where checkpoints go; and whether all hosts see the same folder."""
    place = next(folder for folder in (directory.absolute(), *directory.absolute().parents) if folder.is_dir())
    said = [f".node-test-{socket.gethostname()}-{os.getpid()}.partial"]
    dist.broadcast_object_list(said, src=0)
    shared, is_first, rate = place / said[0], dist.get_rank() == 0, None
    complain = f"checkpoint.directory = {directory}"
    # Nobody leaves between the meetings, whatever its disk says: the others would wait.
    if is_first:
        with _noting(complain, faults):
            shared.write_bytes(b"")
    dist.barrier()
    if not shared.exists():
        faults.append(f"{complain}: {place} is another folder here than on rank 0")
    dist.barrier()
    if os.environ.get("LOCAL_RANK", str(dist.get_rank())) == "0":
        content = os.urandom(2**20) * (512 if on_gpu else 8)
        with _noting(complain, faults):
            rate = _write_rate(place / f".node-test-{dist.get_rank()}-{os.getpid()}.partial", content)
    dist.barrier()
    if is_first:
        shared.unlink(missing_ok=True)
    return rate


@contextlib.contextmanager
def _noting(what: str, faults: list[str]) -> Iterator[None]:
    """What the system says against a file becomes a fault of this node."""
    try:
        yield
    except OSError as error:
        faults.append(f"{what}: {error.strerror} ({error.filename})")


def _write_rate(path: Path, content: bytes) -> float:
    try:
        begun = time.perf_counter()
        with open(path, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        return len(content) / (time.perf_counter() - begun)
    finally:
        path.unlink(missing_ok=True)


_QUERY = (
    "clocks.sm",
    "clocks.max.sm",
    "temperature.gpu",
    "ecc.errors.uncorrected.volatile.total",
    "clocks_throttle_reasons.hw_slowdown",
    "clocks_throttle_reasons.hw_thermal_slowdown",
)


def _gpu_health(device: torch.device, faults: list[str]) -> str:
    """What the driver says of this rank's GPU right after the products."""
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = ["nvidia-smi", f"--id={uuid}", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        faults.append(f"nvidia-smi says nothing of {uuid}: {error}")
        return ""
    clock, most, heat, errors, slowdown, thermal = (part.strip() for part in said.strip().split(","))
    if errors.isdecimal() and int(errors):
        faults.append(f"{uuid} has {errors} uncorrected memory errors")
    if "Active" in (slowdown, thermal):
        faults.append(f"{uuid} is slowed down by its hardware ({'heat' if thermal == 'Active' else 'power or heat'})")
    return f"{clock} of {most} MHz, {heat} C"
