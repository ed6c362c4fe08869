"""What this machine has for training, and why a backend or an FP8 recipe can or cannot run on it."""

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from packaging.version import InvalidVersion, Version

from megatron_ext.config import Fp8Precision, Precision, RuntimeConfig
from megatron_ext.config.machine import Backend
from megatron_ext.config.parallel import FlexBackend
from megatron_ext.errors import EnvironmentFault

_TORCH_WAY_OUT = "set runtime.backend: torch"
_BF16_WAY_OUT = "set precision: {kind: bf16}"
TE_RANGE_STARTS = Version("2.1")
"""Oldest Transformer Engine used. FP8 of grouped experts needs 1.11, the fused permutation of tokens 2.1."""


@dataclass(frozen=True)
class Recipe:
    """What an FP8 recipe needs of Transformer Engine and of the GPU."""

    since: Version
    """Of Transformer Engine, as megatron-core checks it."""
    capability: tuple[int, int]
    """Least compute capability."""
    below: tuple[int, int] | None = None
    """Capability from which on there are no kernels."""
    cuda: tuple[int, int] = (12, 1)
    """Least version of CUDA that torch was built with."""


TE_RECIPES = {
    "tensorwise": Recipe(Version("2.2"), (8, 9)),
    "delayed": Recipe(TE_RANGE_STARTS, (8, 9)),
    "blockwise": Recipe(Version("2.3"), (9, 0), cuda=(12, 9)),
    "mxfp8": Recipe(Version("2.1"), (10, 0), below=(12, 0), cuda=(12, 8)),
}
_GENERATIONS = {(8, 9): "Ada or Hopper", (9, 0): "Hopper", (10, 0): "Blackwell"}


@dataclass(frozen=True)
class Gpu:
    """One CUDA device."""

    name: str
    capability: tuple[int, int]
    memory: int
    """Bytes."""


@dataclass(frozen=True)
class Machine:
    """What decides which backend and precision can run."""

    gpus: tuple[Gpu, ...] = ()
    cuda: tuple[int, int] | None = None
    """Version of CUDA that torch was built with; None without."""
    transformer_engine: Version | None = None
    """Installed version."""
    transformer_engine_fault: str | None = None
    """Why it cannot be imported, where it is installed and there is a GPU."""
    triton: Version | None = None
    """Installed version."""
    flex_faults: Mapping[FlexBackend, str] = field(default_factory=dict)
    """Why libraries of the flex dispatcher cannot be imported, where there is a GPU."""


def installed(distribution: str) -> Version | None:
    """Version of an installed distribution, None where there is none."""
    try:
        return Version(importlib.metadata.version(distribution))
    except (importlib.metadata.PackageNotFoundError, InvalidVersion):
        return None


@functools.cache
def this_machine() -> Machine:
    """What is here. Where there is a GPU, Transformer Engine is imported, since only then is it known to work."""
    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(Gpu(properties.name, (properties.major, properties.minor), properties.total_memory))
    cuda = torch.version.cuda
    version = installed("transformer_engine")
    return Machine(
        gpus=tuple(gpus),
        cuda=tuple(int(part) for part in cuda.split(".")[:2]) if cuda else None,  # type: ignore[arg-type]
        transformer_engine=version,
        transformer_engine_fault=_import_fault() if gpus and version else None,
        triton=installed("triton"),
        flex_faults={name: fault for name in FLEX if (fault := _flex_import_fault(name))} if gpus else {},
    )


FLEX: dict[FlexBackend, tuple[str, dict[str, tuple[str, ...]], str]] = {
    "deepep": (
        "DeepEP",
        {"deep_ep": ("Buffer",), "deep_ep.utils": ("EventHandle", "EventOverlap")},
        "build release 1 of github.com/deepseek-ai/DeepEP against this torch",
    ),
    "hybridep": (
        "HybridEP",
        {"deep_ep": ("HybridEPBuffer",)},
        "build the branch hybrid-ep of github.com/deepseek-ai/DeepEP against this torch",
    ),
}
"""For people, what megatron-core imports of each (fused_a2a.py; without it it takes the library for missing), and how
to get it. Both are in one package, deep_ep."""


def _flex_import_fault(library: FlexBackend) -> str | None:
    for module, names in FLEX[library][1].items():
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError:
            return f"there is no module {module}"
        except (ImportError, OSError, RuntimeError, AttributeError) as error:  # a library or symbol that does not fit
            return f"{type(error).__name__}: {error}"
        if missing := [name for name in names if not hasattr(found, name)]:
            return f"{module} {installed('deep_ep') or ''} has no {missing[0]}"
    return None


def _import_fault() -> str | None:
    if "transformer_engine" in sys.modules and sys.modules["transformer_engine"] is None:
        return "it was hidden before this process saw its GPU"
    try:
        importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # a library or symbol that does not fit
        return f"{type(error).__name__}: {error}"
    return None


def fuses_weight_gradients() -> bool:
    """Whether the extension of NVIDIA Apex is here that adds weight gradients to the fp32 buffer in the product."""
    return importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def backend_fault(backend: Backend, machine: Machine) -> str | None:
    """Why `backend` cannot run here, with the way out; None where it can."""
    if backend == "torch":
        return None
    if not machine.gpus:
        return f"Transformer Engine computes on CUDA only, and torch finds no GPU; {_TORCH_WAY_OUT}"
    if machine.transformer_engine is None:
        return f"Transformer Engine is not installed; pip install 'megatron-ext[te]', or {_TORCH_WAY_OUT}"
    if machine.transformer_engine < TE_RANGE_STARTS:
        return (
            f"Transformer Engine {machine.transformer_engine} is older than {TE_RANGE_STARTS}; install a newer one, "
            f"or {_TORCH_WAY_OUT}"
        )
    if machine.transformer_engine_fault:
        return (
            f"Transformer Engine {machine.transformer_engine} cannot be imported ({machine.transformer_engine_fault}); "
            f"build transformer-engine-torch against this torch ({torch.__version__}), or {_TORCH_WAY_OUT}"
        )
    return None


def precision_fault(backend: Backend, precision: Precision, machine: Machine, *, has_experts: bool) -> str | None:
    """Why `precision` cannot be computed by `backend` here, with the way out; None where it can."""
    if precision.kind == "bf16" and any(gpu.capability < (8, 0) for gpu in machine.gpus):
        return f"bf16 needs compute capability 8.0, {_weakest(machine)}; set precision: {{kind: fp32}}"
    if not isinstance(precision, Fp8Precision):
        return None
    if backend == "torch":
        fault, way_out = _torch_fp8_fault(precision, machine, has_experts), "set runtime.backend: transformer_engine"
    else:
        fault = _recipe_fault(precision.recipe, machine)
        others = [name for name in TE_RECIPES if _recipe_fault(name, machine) is None]
        way_out = f"set recipe: {others[0]}" if others else ""
    ways_out = f"{way_out}, or {_BF16_WAY_OUT}" if way_out else _BF16_WAY_OUT
    return f"FP8 recipe {precision.recipe} {fault}; {ways_out}" if fault else None


def _torch_fp8_fault(precision: Fp8Precision, machine: Machine, has_experts: bool) -> str | None:
    """What torch lacks; on CPU it rounds as the kernels do, whatever the recipe."""
    if not machine.gpus:
        return None
    if precision.recipe in ("blockwise", "mxfp8"):
        return "has no kernel in torch for CUDA"
    if any(gpu.capability < (8, 9) for gpu in machine.gpus):
        return f"needs compute capability 8.9, {_weakest(machine)}"
    if has_experts and any(gpu.capability != (9, 0) for gpu in machine.gpus):
        return f"of routed experts has a kernel in torch for compute capability 9.0 alone, {_weakest(machine)}"
    if precision.recipe == "rowwise" and any(gpu.capability >= (10, 0) for gpu in machine.gpus):
        return "has no cuBLAS kernel from compute capability 10.0 on (torch takes a slow one, or fails)"
    return None


def _recipe_fault(name: str, machine: Machine) -> str | None:
    recipe, version = TE_RECIPES[name], machine.transformer_engine
    if version is not None and version < recipe.since:
        return f"needs Transformer Engine {recipe.since}, and {version} is installed"
    if any(gpu.capability < recipe.capability for gpu in machine.gpus):
        generation = _GENERATIONS[recipe.capability]
        return f"needs {generation} (compute capability {_dotted(recipe.capability)}), {_weakest(machine)}"
    if recipe.below is not None and any(gpu.capability >= recipe.below for gpu in machine.gpus):
        return f"has no kernels from compute capability {_dotted(recipe.below)} on"
    if machine.cuda is not None and machine.cuda < recipe.cuda:
        return f"needs CUDA {_dotted(recipe.cuda)}, and torch was built with {_dotted(machine.cuda)}"
    return None


def kernels_fault(machine: Machine) -> str | None:
    """Why our Triton kernels cannot run here; None where they can.

    With TRITON_INTERPRET=1 in the environment Triton computes them on a CPU, for tests.
    """
    if machine.triton is None:
        return "Triton is not installed; pip install triton"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if not machine.gpus:
        return "Triton compiles for GPUs, and torch finds none"
    if any(gpu.capability < (8, 0) for gpu in machine.gpus):
        return f"our Triton kernels need compute capability 8.0, {_weakest(machine)}"
    return None


def compiler_fault(machine: Machine) -> str | None:
    """Why torch.compile cannot make kernels here; None where it can."""
    if not machine.gpus:
        compiler = os.environ.get("CXX", "g++")
        return None if shutil.which(compiler) else f"torch.compile needs a C++ compiler, and there is no {compiler}"
    if machine.triton is None:
        return "torch.compile writes Triton, which is not installed; pip install triton"
    if any(gpu.capability < (7, 0) for gpu in machine.gpus):
        return f"Triton needs compute capability 7.0, {_weakest(machine)}"
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if not any(map(shutil.which, compilers)):
        return f"Triton builds its launchers with a C compiler, and there is no {' or '.join(compilers)}"
    return None


def flex_fault(library: FlexBackend, machine: Machine) -> str | None:
    """Why `library` cannot send tokens here, with the way out; None where it can."""
    name, _, how_to_get = FLEX[library]
    way_out = "set parallel.moe_token_dispatcher_type: alltoall"
    if not machine.gpus:
        return f"{name} sends between GPUs, and torch finds none; {way_out}"
    if any(gpu.capability < (9, 0) for gpu in machine.gpus):
        return f"{name} needs compute capability 9.0, {_weakest(machine)}; {way_out}"
    if fault := machine.flex_faults.get(library):
        return f"{name} cannot be used ({fault}); {how_to_get}, or {way_out}"
    return None


def require(
    runtime: RuntimeConfig,
    precision: Precision,
    *,
    has_experts: bool,
    flex: FlexBackend | None = None,
    machine: Machine | None = None,
) -> None:
    """Raise EnvironmentFault where this machine cannot train with the backend of `runtime` in `precision`.

    Args:
        flex: the library that is to send tokens to their experts.
        machine: what to judge by; default: this one, without its GPUs in a run on CPU.
    """
    if machine is None:
        machine = Machine(triton=installed("triton")) if runtime.device == "cpu" else this_machine()
    if fault := backend_fault(runtime.backend, machine):
        raise EnvironmentFault(f"runtime.backend = {runtime.backend!r}: {fault}")
    if fault := precision_fault(runtime.backend, precision, machine, has_experts=has_experts):
        raise EnvironmentFault(f"precision.kind = {precision.kind!r}: {fault}")
    if flex is not None and (fault := flex_fault(flex, machine)):
        raise EnvironmentFault(f"parallel.moe_token_dispatcher_type = 'flex': {fault}")
    if runtime.kernels == "triton" and (fault := kernels_fault(machine)):
        raise EnvironmentFault(f"runtime.kernels = {runtime.kernels!r}: {fault}; or set runtime.kernels: torch")
    if runtime.compile_router and (fault := compiler_fault(machine)):
        raise EnvironmentFault(f"runtime.compile_router = True: {fault}; or set runtime.compile_router: false")


def _weakest(machine: Machine) -> str:
    gpu = min(machine.gpus, key=lambda gpu: gpu.capability)
    return f"and {gpu.name} has {_dotted(gpu.capability)}"


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
