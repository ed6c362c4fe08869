"""The locks of requirements/: every version that pyproject.toml asks for, in its range, and nothing but versions."""

import re
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
    wanted = [*asked_for(), Requirement((ROOT / "requirements" / "cpu.txt").read_text().splitlines()[-1])]
    for requirement in wanted:
        version = versions[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement}: {lock.name} has {version}"


def test_the_oldest_and_the_newest_python_that_are_tested_have_a_lock() -> None:
    assert {"lock-3.11", "lock-3.12"} <= {path.stem for path in LOCKS}
