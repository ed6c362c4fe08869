"""What an environment is made of: locks with every version that is asked for, in its range; and which Python."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import ROOT

LOCKS = sorted((ROOT / "requirements").glob("lock-*.txt"))


def asked_for() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [Requirement(line) for line in [*project["dependencies"], *project["optional-dependencies"]["dev"]]]


@pytest.mark.parametrize("lock", LOCKS, ids=lambda path: path.stem)
def test_a_lock_holds_what_is_asked_for_and_names_versions_only(lock: Path) -> None:
    lines = [line for line in lock.read_text().splitlines() if not line.startswith("#")]
    foreign = [line for line in lines if not re.fullmatch(r"[a-z0-9-]+==[A-Za-z0-9.]+", line)]
    assert not foreign, "an index, a host, a build or a hash"
    versions = dict(line.split("==") for line in lines)
    lines = (ROOT / "requirements" / "cpu.txt").read_text().splitlines()
    python = lock.stem.removeprefix("lock-")
    of_machine = [Requirement(line) for line in lines if not line.startswith("#")]
    here = [r for r in of_machine if r.marker is None or r.marker.evaluate({"python_version": python})]
    assert here, "a torch for this Python"
    for requirement in [*asked_for(), *here]:
        version = versions[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement}: {lock.name} has {version}"


def test_the_oldest_and_the_newest_python_that_are_tested_have_a_lock() -> None:
    assert {"lock-3.11", "lock-3.12"} <= {path.stem for path in LOCKS}


def stub(directory: Path, name: str, version: str, *, venv: bool = True) -> None:
    """A command that answers as a Python of `version` would; without a version, as pyenv's for one that is off."""
    lines = [
        "#!/bin/bash",
        f'[ -n "{version}" ] || {{ echo "pyenv: {name}: command not found" >&2; exit 127; }}',
        f'case "$2" in *version_info*) echo {version};; "import venv"*) exit {int(not venv)};;',
        '  venv) mkdir -p "$3/bin"; cp "$0" "$3/bin/python";; esac',
    ]
    path = directory / name
    path.write_text("\n".join(lines) + "\n")
    path.chmod(0o755)


@pytest.fixture
def pythons(tmp_path: Path) -> Path:
    """A folder for the only Pythons on the path, beside what the script calls."""
    directory = tmp_path / "bin"
    directory.mkdir()
    for program in ("bash", "cp", "dirname", "head", "mkdir", "sed", "sort"):
        (directory / program).symlink_to(shutil.which(program) or program)
    return directory


def made(pythons: Path, *asked: str) -> tuple[int, str]:
    """Exit code and words of requirements/environment.sh."""
    command = [ROOT / "requirements" / "environment.sh", pythons.parent / "venv", *asked]
    process = subprocess.run(
        [*map(str, command)], env={"PATH": str(pythons)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return process.returncode, process.stdout


def locked_core(python: str) -> str:
    return re.findall(r"^megatron-core==(.*)", (ROOT / "requirements" / f"lock-{python}.txt").read_text(), re.M)[0]


def test_the_newest_python_that_runs_is_taken(pythons: Path) -> None:
    stub(pythons, "python3.13", "")
    stub(pythons, "python3.12", "3.12")
    stub(pythons, "python3.11", "3.11")
    code, said = made(pythons)
    assert code == 0
    assert "python3.13 is left out: it does not run" in said
    assert f"venv: Python 3.12 with megatron-core {locked_core('3.12')}\n" in said
    assert "the one to use" not in said


def test_what_cannot_be_used_is_left_out_with_the_reason(pythons: Path) -> None:
    stub(pythons, "python3.12", "3.12", venv=False)
    stub(pythons, "python3.11", "3.11")
    code, said = made(pythons)
    assert code == 0
    assert "python3.12 is left out: it lacks the venv module (Debian: apt install python3.12-venv)" in said
    assert f"Python 3.11 with megatron-core {locked_core('3.11')}" in said
    assert f"Python 3.12 with megatron-core {locked_core('3.12')} is the one to use" in said


def test_without_any_python_the_way_out_is_said(pythons: Path) -> None:
    stub(pythons, "python3", "3.9")
    code, said = made(pythons)
    assert code == 2
    assert "python3 is left out: it is Python 3.9, and 3.11 is the oldest that is supported" in said
    assert "make PYTHON=/path/to/python3.12" in said


def test_the_python_that_is_asked_for_is_taken_and_an_environment_keeps_its_own(pythons: Path) -> None:
    stub(pythons, "python3.12", "3.12")
    stub(pythons, "mine", "3.11")
    assert "venv: Python 3.11" in made(pythons, "mine")[1]
    code, said = made(pythons, "python3.12")
    assert code == 0
    assert "keeps Python 3.11" in said
    assert "python3.12 is not in use: remove" in said
    assert "keeps Python 3.11" in made(pythons)[1]
