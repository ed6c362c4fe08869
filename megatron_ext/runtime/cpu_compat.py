"""Lets megatron-core run on CPU tensors over Gloo: the only place that rebinds foreign names, and only on CPU runs.

Megatron-core names CUDA in the middle of its functions (`torch.cuda.Stream()`, `device="cuda"`). Inside its modules,
and nowhere else, the names `torch`, `torch.cuda` and `torch.distributed` are replaced by stand-ins that pass
everything through except what is listed in `SHIMS`. No operation is intercepted: a tensor's own methods are untouched.
Each shim has a test that leaves it out and expects megatron-core to fail without it.
"""

import contextlib
import importlib.abc
import importlib.machinery
import logging
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Shim:
    """One name that megatron-core gets to see differently on a CPU run."""

    name: str
    """Dotted name as megatron-core writes it."""
    replacement: Any
    reason: str


class NullStream:
    """Stands for a CUDA stream or event where there is only one order of execution."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, other: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: Any = None) -> "NullStream":
        return self


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`factory` that puts on the CPU what asks for CUDA, and into ordinary memory what asks for page-locked."""

    def on_cpu(*args: Any, **kwargs: Any) -> torch.Tensor:
        kwargs.pop("pin_memory", None)
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = CPU
        return factory(*args, **kwargs)

    return on_cpu


def _all_to_all_single(
    output: torch.Tensor,
    input: torch.Tensor,  # noqa: A002 - torch's own parameter name
    output_split_sizes: Any = None,
    input_split_sizes: Any = None,
    group: Any = None,
    async_op: bool = False,
) -> Any:
    out, into = (s.tolist() if isinstance(s, torch.Tensor) else s for s in (output_split_sizes, input_split_sizes))
    return dist.all_to_all_single(output, input, out, into, group=group, async_op=async_op)


def _all_gather(
    tensor_list: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, async_op: bool = False
) -> Any:
    rows = [t.shape[0] if t.dim() else 1 for t in tensor_list]
    if len(set(rows)) == 1:
        return dist.all_gather(tensor_list, tensor, group=group, async_op=async_op)
    padded = tensor.new_zeros((max(rows), *tensor.shape[1:]))
    padded[: tensor.shape[0]] = tensor
    gathered = [torch.empty_like(padded) for _ in rows]
    dist.all_gather(gathered, padded, group=group)
    for target, source in zip(tensor_list, gathered, strict=True):
        target.copy_(source[: target.shape[0]])
    return None


_STREAM = "there are no streams on a CPU"
_LITERAL = "literal CUDA device"
_RNG = "the tracker of random states knows only CUDA generators"

SHIMS: tuple[Shim, ...] = (
    Shim("torch.cuda.current_device", lambda: CPU, "device of buffers and parameters"),
    Shim("torch.cuda.Stream", NullStream, _STREAM),
    Shim("torch.cuda.current_stream", NullStream, _STREAM),
    Shim("torch.cuda.synchronize", lambda *args: None, _STREAM),
    Shim("torch.cuda.get_rng_state", lambda *args: torch.get_rng_state(), _RNG),
    Shim("torch.cuda.manual_seed", lambda seed: torch.manual_seed(seed), _RNG),
    Shim("megatron.core.tensor_parallel.random._get_cuda_rng_state", lambda *a, **k: torch.get_rng_state(), _RNG),
    Shim(
        "megatron.core.tensor_parallel.random._set_cuda_rng_state",
        lambda state, *a, **k: torch.set_rng_state(state),
        _RNG,
    ),
    Shim("torch.tensor", _on_cpu(torch.tensor), f"{_LITERAL}; page-locked memory, which a CPU-only torch lacks"),
    Shim("torch.zeros", _on_cpu(torch.zeros), _LITERAL),
    Shim("torch.distributed.all_to_all_single", _all_to_all_single, "Gloo takes split sizes as lists only"),
    Shim("torch.distributed.all_gather", _all_gather, "Gloo gathers equal shapes only"),
    Shim("torch.Tensor.cuda", lambda self, *args, **kwargs: self, "moves a tied output embedding to the GPU"),
)


class _StandIn(types.ModuleType):
    """A module that answers with another module's attributes except for its own."""

    def __init__(self, real: types.ModuleType) -> None:
        super().__init__(real.__name__)
        self.__dict__["_real"] = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_real"], name)


class _AfterImport(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Changes modules as soon as they are imported: a list of what a name begins with, and the change."""

    def __init__(self) -> None:
        self.changes: list[tuple[str, Callable[[types.ModuleType], None]]] = []
        self.around: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {}
        """What is open while the module of this name is executed."""

    def add(self, prefix: str, change: Callable[[types.ModuleType], None]) -> None:
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)
        self.changes.append((prefix, change))

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> Any:
        changes = [change for prefix, change in self.changes if fullname.startswith(prefix)]
        around = self.around.get(fullname, contextlib.nullcontext)
        is_ours = bool(changes) or fullname in self.around
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target) if is_ours else None
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            run = spec.loader.exec_module

            def exec_module(module: types.ModuleType) -> None:
                with around():
                    run(module)
                for change in changes:
                    change(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


_after_import = _AfterImport()


def _rebind(module: types.ModuleType, stand_ins: Sequence[_StandIn]) -> None:
    """Give `module` the stand-in of every module that it has under a name of its own."""
    by_module = {id(stand_in._real): stand_in for stand_in in stand_ins}
    for name, value in list(vars(module).items()):
        if isinstance(value, types.ModuleType) and id(value) in by_module:
            setattr(module, name, by_module[id(value)])


_installed = False


def install(without: frozenset[str] = frozenset()) -> None:
    """Make megatron-core run on CPU in this process; for good, and once.

    Args:
        without: names of shims to leave out, for the test that each is needed.
    """
    global _installed
    if _installed:
        return
    _installed = True
    modules: dict[str, Any] = {m.__name__: _StandIn(m) for m in (torch, torch.cuda, torch.distributed)}
    modules["torch"].cuda, modules["torch"].distributed = modules["torch.cuda"], modules["torch.distributed"]
    # The generator that stands for the GPU's is the CPU's: of course it changes.
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: record.msg != "CPU RNG state changed within GPU RNG context"
    )
    stand_ins = list(modules.values())
    _after_import.add("megatron.core.", lambda module: _rebind(module, stand_ins))
    for module in [m for name, m in sys.modules.items() if name.startswith("megatron.core")]:
        _rebind(module, stand_ins)
    for shim in SHIMS:
        if shim.name in without:
            continue
        owner, _, attribute = shim.name.rpartition(".")
        setattr(modules[owner] if owner in modules else _resolve(owner), attribute, shim.replacement)


def _resolve(dotted: str) -> Any:
    if dotted == "torch.Tensor":
        return torch.Tensor
    return importlib.import_module(dotted)


def keep_transformer_engine_out() -> None:
    """Hide Transformer Engine where there is no GPU, before megatron-core is imported.

    megatron-core would pick its CUDA-only Adam and norms just because it can be imported.
    """
    if "transformer_engine" not in sys.modules and not torch.cuda.is_available():
        sys.modules["transformer_engine"] = None  # type: ignore[assignment]


def keep_compiler_out() -> None:
    """Where there is no GPU, have megatron-core leave its elementwise functions as they are written.

    It wraps each in `torch.compile` as it is imported, which imports the whole compiler: a quarter of the time in which
    a process starts, and 44 MB, for functions of its fused paths, which are off there.
    """
    name = "megatron.core.jit"
    if name not in sys.modules and not torch.cuda.is_available():
        _after_import.add(name, lambda module: module.disable_jit_fuser())
        # 0.19 compiles a method of its inference router without asking there.
        _after_import.around["megatron.core.transformer.moe.router"] = _nothing_compiled


@contextlib.contextmanager
def _nothing_compiled() -> Iterator[None]:
    """While open, `torch.compile` leaves functions as they are written."""
    real = torch.compile

    def as_written(function: Any = None, **_: Any) -> Any:
        return (lambda decorated: decorated) if function is None else function

    torch.compile = as_written  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = real


@contextlib.contextmanager
def cuda_type_names() -> Iterator[None]:
    """While open, `tensor.type()` says `torch.cuda.*Tensor`: megatron-core's optimizers sort parameters by it."""
    real = torch.Tensor.type

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = real(self, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) and self.device == CPU else answer

    torch.Tensor.type = type_name  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.Tensor.type = real  # type: ignore[method-assign]
