"""The report on this machine: what is installed and active, what is missing and why, which faults are answered."""

import importlib.util
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch

from megatron_ext.config import Bf16Precision, Fp8Precision, Fp32Precision, Precision
from megatron_ext.config.machine import Backend
from megatron_ext.errors import EnvironmentFault
from megatron_ext.runtime import core_guard
from megatron_ext.runtime.accelerators import (
    FLEX,
    Machine,
    backend_fault,
    compiler_fault,
    flex_fault,
    fuses_weight_gradients,
    installed,
    kernels_fault,
    precision_fault,
    this_machine,
)
from megatron_ext.runtime.cpu_speed import slow_bf16

_RECIPES: tuple[Literal["tensorwise", "rowwise", "delayed", "blockwise", "mxfp8"], ...] = (
    "tensorwise",
    "rowwise",
    "delayed",
    "blockwise",
    "mxfp8",
)
_PRECISIONS: tuple[tuple[str, Precision], ...] = (
    ("fp32", Fp32Precision(kind="fp32")),
    ("bf16", Bf16Precision(kind="bf16")),
    *((f"fp8 {recipe}", Fp8Precision(kind="fp8", recipe=recipe)) for recipe in _RECIPES),
)


@dataclass(frozen=True)
class Report:
    """What was found."""

    sections: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]
    """(title, rows of (name, finding))."""
    fault: str | None
    """Why no training can run here; None if it can."""


def examine(machine: Machine | None = None) -> Report:
    """Look at this machine, or judge by `machine` what backends and precisions could run."""
    machine = machine or this_machine()
    sections = [
        ("Machine", _hardware(machine)),
        ("Installed", _software(machine)),
        ("Backend torch", _backend("torch", machine)),
        ("Backend transformer_engine", _backend("transformer_engine", machine)),
    ]
    try:
        version = core_guard.installed_version()
    except EnvironmentFault as fault:
        return Report(tuple((title, tuple(rows)) for title, rows in sections), str(fault))
    sections.append((f"Known faults of megatron-core {version}", core_faults()))
    return Report(tuple((title, tuple(rows)) for title, rows in sections), None)


def _hardware(machine: Machine) -> Iterator[tuple[str, str]]:
    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = os.environ.get("OMP_NUM_THREADS")
    yield "CPU", f"{_cpu_name()}, {cores} cores usable, {torch.get_num_threads()} threads in this process"
    yield "OMP_NUM_THREADS", threads or "not set: a run takes the cores over the local processes"
    yield "memory", f"{memory.total / 2**30:.1f} GiB, {memory.available / 2**30:.1f} GiB available"
    if not machine.gpus:
        yield "GPU", "none that torch can use: runs are on CPU, over Gloo"
    for index, gpu in enumerate(machine.gpus):
        capability = ".".join(map(str, gpu.capability))
        yield f"GPU {index}", f"{gpu.name}, compute capability {capability}, {gpu.memory / 2**30:.0f} GiB"
    if machine.gpus:
        told = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF")
        yield "PYTORCH_ALLOC_CONF", told or "not set: launch/torchrun.sh sets expandable_segments:True"
    yield "driver", _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") or "no nvidia-smi"
    yield "Slurm", _first_line("sinfo", "--version") or "not here; one machine needs none (launch/torchrun.sh)"


def _software(machine: Machine) -> Iterator[tuple[str, str]]:
    yield "python", core_guard.versions()
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    yield "torch", f"{torch.__version__}, {built}"
    nccl = torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else None
    yield "NCCL", ".".join(map(str, nccl)) if nccl else "not in this torch"
    for name in ("megatron-core", "transformers", "safetensors", "sentencepiece", "tokenizers", "wandb"):
        yield name, str(installed(name) or "not installed")
    version = machine.transformer_engine
    hidden = "" if machine.gpus else ", kept out of sight: it needs a GPU"
    yield "Transformer Engine", f"{version}{hidden}" if version else "not installed; not required"
    yield "NVIDIA Apex", apex_finding()
    for library, (label, _, _) in FLEX.items():
        fault = flex_fault(library, machine)
        unproven = f"deep_ep {installed('deep_ep')}; our side of it is proven on CPU, it itself by no run of ours"
        yield label, f"cannot be used: {fault}" if fault else unproven
    flash = installed("flash-attn")
    used = "an attention kernel that Transformer Engine may choose"
    yield "flash-attn", f"{flash}, {used}" if flash else f"not installed; not required ({used})"


def apex_finding() -> str:
    """Which project the package `apex` is, if there is one: NVIDIA's, or another one of that name on PyPI."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return "not installed; not required (it fuses weight gradients with Transformer Engine's layers)"
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if not any((folder / "optimizers").is_dir() for folder in folders):
        return (
            "no: the package apex installed here is another project of that name from PyPI, of no use; "
            "pip uninstall apex"
        )
    if not fuses_weight_gradients():
        return (
            "installed without its CUDA extensions; build it from github.com/NVIDIA/apex with --cuda_ext, "
            "or do without: weight gradients are then added in a kernel of their own"
        )
    return "installed, with fused weight gradients"


def _backend(backend: Backend, machine: Machine) -> Iterator[tuple[str, str]]:
    fault = backend_fault(backend, machine)
    if fault is not None:
        yield "cannot run", fault
        return
    yield from _torch_kernels(machine) if backend == "torch" else _te_kernels()
    for name, precision in _PRECISIONS:
        if backend == "transformer_engine" and name == "fp8 rowwise":
            continue
        dense = precision_fault(backend, precision, machine, has_experts=False)
        experts = precision_fault(backend, precision, machine, has_experts=True)
        on_cpu = backend == "torch" and not machine.gpus and name.startswith("fp8")
        runs = "runs, rounded as on a GPU, for its numerics and not for speed" if on_cpu else "runs"
        if name == "bf16" and backend == "torch" and not machine.gpus and (slow := slow_bf16()):
            runs = f"runs, slowly: {slow}"
        yield name, f"cannot run: {dense}" if dense else f"dense models only: {experts}" if experts else runs


def _torch_kernels(machine: Machine) -> Iterator[tuple[str, str]]:
    flash = bool(machine.gpus) and torch.backends.cuda.is_flash_attention_available()
    if not machine.gpus:
        yield "attention", "active: torch's flash kernel for CPU"
    elif flash and all(gpu.capability >= (8, 0) for gpu in machine.gpus):
        yield "attention", "active: torch's flash kernel in bf16, the memory-efficient one in fp32"
    else:
        yield "attention", "memory-efficient kernel; flash needs compute capability 8.0 and a torch built with it"
    if not machine.gpus:
        yield "experts", "one product an expert in shapes that oneDNN keeps kernels for; grouped_mm needs a GPU"
    elif all(gpu.capability >= (8, 0) for gpu in machine.gpus):
        yield "experts", "active: one grouped_mm kernel a projection in bf16"
    else:
        yield "experts", "grouped_mm has no kernel below compute capability 8.0: a loop inside torch"
    yield "optimizer", "active: torch's fused AdamW"
    fault = kernels_fault(machine)
    yield "our own kernels", f"cannot run: {fault}" if fault else "off; runtime.kernels: triton takes them"
    fault = compiler_fault(machine)
    yield "router", f"cannot be compiled: {fault}" if fault else "one step of torch at a time; runtime.compile_router"


def _te_kernels() -> Iterator[tuple[str, str]]:
    yield "layers", "active: fused norms and linear layers, grouped experts, fused rotary embedding and permutation"
    apex = "too" if fuses_weight_gradients() else f"added in a kernel of its own; Apex: {apex_finding()}"
    yield "weight gradients", f"fused into the fp32 buffer; the output layer's {apex}"


def core_faults() -> Iterator[tuple[str, str]]:
    """Every known fault of the installed megatron-core, and what is done about it."""
    version = core_guard.installed_version()
    for fault in core_guard.FAULTS:
        if fault.present_in(version):
            yield f"{fault.answer}: {fault.name}", f"{fault.what} -> {fault.how}"
        else:
            yield f"fixed: {fault.name}", f"in {fault.fixed_in}"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _first_line(program: str, *arguments: str) -> str | None:
    """What `program` prints first; None where it is not installed or fails."""
    if shutil.which(program) is None:
        return None
    try:
        process = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = process.stdout.strip().splitlines()
    return lines[0] if process.returncode == 0 and lines else None
