"""Which backend and precision a machine can run: each reason is said, with the way out."""

import sys
from types import ModuleType

import pytest
import torch
from packaging.version import Version

from megatron_ext.config import Bf16Precision, Fp8Precision, Fp32Precision, Precision, RuntimeConfig
from megatron_ext.config.parallel import FlexBackend
from megatron_ext.errors import EnvironmentFault
from megatron_ext.runtime.accelerators import Gpu, Machine, require, this_machine

TE = RuntimeConfig(backend="transformer_engine")
BF16 = Bf16Precision(kind="bf16")


def machine(
    capability: tuple[int, int] = (9, 0), te: str | None = "2.20.2", cuda: tuple[int, int] = (13, 0)
) -> Machine:
    return Machine((Gpu("a GPU", capability, 80 * 2**30),), cuda, Version(te) if te else None)


def recipe(name: str) -> Precision:
    return Fp8Precision(kind="fp8", recipe=name)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("here", "precision", "expected"),
    [
        (Machine(transformer_engine=Version("2.20.2")), BF16, "torch finds no GPU; set runtime.backend: torch"),
        (machine(te=None), BF16, r"is not installed; pip install 'megatron-ext\[te\]', or set runtime.backend: torch"),
        (machine(te="1.13"), BF16, "Transformer Engine 1.13 is older than 2.1"),
        (
            Machine(machine().gpus, (13, 0), Version("2.20.2"), "OSError: libcudart.so.12"),
            BF16,
            "cannot be imported .OSError: libcudart.so.12.; build transformer-engine-torch against this torch",
        ),
        (machine((7, 5)), BF16, "bf16 needs compute capability 8.0, and a GPU has 7.5"),
        (machine((8, 0)), recipe("tensorwise"), r"Ada or Hopper .* has 8.0; set precision: {kind: bf16}"),
        (machine((8, 9)), recipe("blockwise"), r"needs Hopper .*9.0.*, and a GPU has 8.9; set recipe: tensorwise, or"),
        (machine((9, 0)), recipe("mxfp8"), r"needs Blackwell .* set recipe: tensorwise, or"),
        (machine((12, 0)), recipe("mxfp8"), "no kernels from compute capability 12.0 on; set recipe: tensorwise, or"),
        (machine(cuda=(12, 6)), recipe("blockwise"), "needs CUDA 12.9, and torch was built with 12.6"),
        (machine(te="2.1"), recipe("tensorwise"), "needs Transformer Engine 2.2, and 2.1 is .*; set recipe: delayed"),
        (machine(te="2.2"), recipe("blockwise"), "needs Transformer Engine 2.3, and 2.2 is installed"),
    ],
)
def test_what_cannot_run_is_refused_with_reason_and_way_out(here: Machine, precision: Precision, expected: str) -> None:
    with pytest.raises(EnvironmentFault, match=expected):
        require(TE, precision, has_experts=True, machine=here)


@pytest.mark.parametrize(
    ("here", "precision"),
    [
        (machine((8, 0)), BF16),
        (machine((8, 9)), recipe("delayed")),
        (machine((9, 0)), recipe("tensorwise")),
        (machine((9, 0)), recipe("blockwise")),
        (machine((10, 0)), recipe("mxfp8")),
        (machine((12, 0)), recipe("tensorwise")),
    ],
)
def test_what_can_run_passes(here: Machine, precision: Precision) -> None:
    require(TE, precision, has_experts=True, machine=here)


@pytest.mark.parametrize(
    ("here", "name", "has_experts", "expected"),
    [
        (machine((9, 0)), "mxfp8", False, "has no kernel in torch for CUDA; set runtime.backend: transf"),
        (machine((8, 0)), "tensorwise", False, "needs compute capability 8.9, and a GPU has 8.0"),
        (machine((10, 0)), "tensorwise", True, "of routed experts has a kernel in torch for compute capability 9.0"),
    ],
)
def test_fp8_of_the_torch_backend_needs_its_kernels(here: Machine, name: str, has_experts: bool, expected: str) -> None:
    with pytest.raises(EnvironmentFault, match=expected):
        require(RuntimeConfig(), recipe(name), has_experts=has_experts, machine=here)


def test_the_torch_backend_asks_for_nothing_on_cpu() -> None:
    for precision in (Fp32Precision(kind="fp32"), BF16, recipe("tensorwise"), recipe("mxfp8")):
        require(RuntimeConfig(), precision, has_experts=True, machine=Machine())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_this_machine_is_described_without_importing_transformer_engine() -> None:
    assert this_machine().gpus == ()
    assert this_machine().transformer_engine_fault is None
    with pytest.raises(EnvironmentFault, match=r"runtime\.backend = 'transformer_engine': .* no GPU"):
        require(TE, BF16, has_experts=False)


@pytest.mark.parametrize(
    ("here", "expected"),
    [
        (
            Machine((Gpu("a GPU", (9, 0), 1),)),
            "Triton is not installed; pip install triton; or set runtime.kernels: torch",
        ),
        (Machine(triton=Version("3.7.0")), "Triton compiles for GPUs, and torch finds none; or set"),
        (
            Machine((Gpu("a GPU", (7, 5), 1),), triton=Version("3.7.0")),
            "need compute capability 8.0, and a GPU has 7.5",
        ),
    ],
)
def test_our_own_kernels_are_refused_where_they_cannot_run(
    here: Machine, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    precision = Fp32Precision(kind="fp32")
    with pytest.raises(EnvironmentFault, match=rf"runtime.kernels = 'triton': .*{expected}"):
        require(RuntimeConfig(kernels="triton"), precision, has_experts=False, machine=here)
    require(RuntimeConfig(), precision, has_experts=False, machine=here)


def test_routers_are_compiled_where_there_is_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, precision = RuntimeConfig(compile_router=True), Fp32Precision(kind="fp32")
    gpu = Gpu("a GPU", (8, 0), 1)
    for variable in ("CC", "CXX"):
        monkeypatch.setenv(variable, sys.executable)  # any program that is there
    for here in (Machine(), Machine((gpu,), triton=Version("3.7.0"))):
        require(compiled, precision, has_experts=True, machine=here)
    with pytest.raises(EnvironmentFault, match=r"pip install triton; or set runtime\.compile_router: false"):
        require(compiled, precision, has_experts=True, machine=Machine((gpu,)))
    for variable in ("CC", "CXX"):
        monkeypatch.setenv(variable, "no-such-compiler")
    for here in (Machine(), Machine((gpu,), triton=Version("3.7.0"))):
        with pytest.raises(EnvironmentFault, match=r"compile_router = True: .* there is no no-such-compiler"):
            require(compiled, precision, has_experts=True, machine=here)


def test_our_own_kernels_run_on_gpus_and_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    kernels, precision = RuntimeConfig(kernels="triton"), Fp32Precision(kind="fp32")
    gpu = Machine((Gpu("a GPU", (8, 0), 1),), triton=Version("3.7.0"))
    require(kernels, precision, has_experts=False, machine=gpu)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    require(kernels, precision, has_experts=False, machine=Machine(triton=Version("3.7.0")))


@pytest.mark.parametrize(
    ("here", "library", "expected"),
    [
        (Machine(), "deepep", "'flex': DeepEP sends between GPUs, and torch finds none; set parallel.moe_token_disp"),
        (machine((8, 0)), "hybridep", "HybridEP needs compute capability 9.0, and a GPU has 8.0; set parallel.moe_tok"),
        (
            Machine(machine().gpus, (13, 0), flex_faults={"deepep": "there is no module deep_ep"}),
            "deepep",
            "DeepEP cannot be used .there is no module deep_ep.; build release 1 of .*, or set parallel.moe_token_disp",
        ),
    ],
)
def test_a_library_that_cannot_send_tokens_is_refused(here: Machine, library: FlexBackend, expected: str) -> None:
    torch_backend = RuntimeConfig()
    with pytest.raises(EnvironmentFault, match=expected):
        require(torch_backend, BF16, has_experts=True, flex=library, machine=here)
    require(torch_backend, BF16, has_experts=True, flex="hybridep", machine=machine())


def test_what_megatron_core_imports_of_deepep_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Release 2 has no EventOverlap where megatron-core takes it from, and megatron-core would call DeepEP missing."""
    from megatron_ext.runtime.accelerators import _flex_import_fault

    monkeypatch.setitem(sys.modules, "deep_ep", None)
    assert _flex_import_fault("deepep") == "there is no module deep_ep"
    package, utils = ModuleType("deep_ep"), ModuleType("deep_ep.utils")
    package.Buffer = utils.EventHandle = object  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deep_ep", package)
    monkeypatch.setitem(sys.modules, "deep_ep.utils", utils)
    assert "deep_ep.utils" in str(_flex_import_fault("deepep"))
    assert "EventOverlap" in str(_flex_import_fault("deepep"))
    assert "HybridEPBuffer" in str(_flex_import_fault("hybridep"))
    utils.EventOverlap = package.HybridEPBuffer = object  # type: ignore[attr-defined]
    assert _flex_import_fault("deepep") is _flex_import_fault("hybridep") is None
