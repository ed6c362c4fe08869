"""What the doctor finds on machines of several kinds."""

import re
from pathlib import Path

import pytest
import torch
from packaging.version import Version

from megatron_ext.runtime import core_guard
from megatron_ext.runtime.accelerators import Gpu, Machine
from megatron_ext.runtime.doctor import Report, apex_finding, examine
from tests.conftest import ROOT

H100 = Machine((Gpu("NVIDIA H100", (9, 0), 80 * 2**30),), (13, 0), Version("2.20.2"))
B200 = Machine((Gpu("NVIDIA B200", (10, 0), 180 * 2**30),), (13, 0), None, triton=Version("3.7.0"))


def finding(report: Report, section: str, name: str) -> str:
    rows = dict(next(rows for title, rows in report.sections if title.startswith(section)))
    return rows[name]


def test_a_hopper_node_with_transformer_engine() -> None:
    report = examine(H100)
    assert finding(report, "Machine", "GPU 0") == "NVIDIA H100, compute capability 9.0, 80 GiB"
    assert finding(report, "Backend torch", "fp8 rowwise") == "runs"
    assert finding(report, "Backend torch", "our own kernels").startswith("cannot run: Triton is not installed")
    assert "no kernel in torch" in finding(report, "Backend torch", "fp8 mxfp8")
    assert finding(report, "Backend transformer_engine", "fp8 blockwise") == "runs"
    assert "needs Blackwell" in finding(report, "Backend transformer_engine", "fp8 mxfp8")
    assert report.fault is None


def test_a_blackwell_node_without_transformer_engine() -> None:
    report = examine(B200)
    assert "pip install" in finding(report, "Backend transformer_engine", "cannot run")
    assert finding(report, "Backend torch", "fp8 tensorwise").startswith("dense models only")
    assert "no cuBLAS kernel from compute capability 10.0 on" in finding(report, "Backend torch", "fp8 rowwise")
    assert finding(report, "Backend torch", "our own kernels") == "off; runtime.kernels: triton takes them"
    assert finding(report, "Backend torch", "router").startswith("one step of torch at a time")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_this_machine_without_a_gpu() -> None:
    report = examine()
    assert finding(report, "Machine", "GPU").startswith("none that torch can use")
    assert finding(report, "Backend torch", "bf16").startswith("runs")
    assert "no GPU" in finding(report, "Backend transformer_engine", "cannot run")


@pytest.mark.parametrize(
    ("python", "core", "line"),
    [
        ("3.12.1", "0.19.2", "Python 3.12.1 with megatron-core 0.19.2"),
        ("3.13.0", "0.17.0", "Python 3.13.0 with megatron-core 0.17.0; 0.19 is the one to use: pip install 'megatron-"),
        ("3.11.7", "0.16.1", "Python 3.11.7 with megatron-core 0.16.1: supported, with more faults; Python 3.12 with "),
    ],
)
def test_one_line_says_which_python_and_core_this_is_and_which_to_use(python: str, core: str, line: str) -> None:
    said = core_guard.versions(python, Version(core))
    assert said.startswith(line)
    assert len(said.splitlines()) == 1
    assert ("the one to use" in said) == (core != "0.19.2")


def test_the_doctor_says_it_of_this_installation() -> None:
    assert finding(examine(H100), "Installed", "python") == core_guard.versions()


def test_every_fault_of_the_installed_core_has_its_answer() -> None:
    version = core_guard.installed_version()
    rows = next(rows for title, rows in examine(H100).sections if title.startswith("Known faults"))
    expected = [f"{f.answer if f.present_in(version) else 'fixed'}: {f.name}" for f in core_guard.FAULTS]
    assert [name for name, _ in rows] == expected
    assert all(text for _, text in rows)


def test_the_files_that_an_answer_names_are_there() -> None:
    named = [name for fault in core_guard.FAULTS for name in re.findall(r"\(([\w/]+\.py)\)", fault.how)]
    assert named
    assert not [name for name in named if not (ROOT / "megatron_ext" / name).is_file()]


def make_package(directory: Path, *files: str) -> None:
    for file in files:
        (directory / file).parent.mkdir(parents=True, exist_ok=True)
        (directory / file).write_text("")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ((), "not installed"),
        (("apex/__init__.py", "apex/lib/helpers.py"), "another project of that name from PyPI"),
        (("apex/__init__.py", "apex/optimizers/__init__.py"), "installed without its CUDA extensions"),
        (
            ("apex/__init__.py", "apex/optimizers/__init__.py", "fused_weight_gradient_mlp_cuda.py"),
            "installed, with fused weight gradients",
        ),
    ],
    ids=["none", "namesake", "python-only", "whole"],
)
def test_nvidia_apex_and_its_namesake_are_told_apart(
    files: tuple[str, ...], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_package(tmp_path, *files)
    monkeypatch.syspath_prepend(tmp_path)
    assert expected in apex_finding()
