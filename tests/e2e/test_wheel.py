"""The built wheel has everything an installed copy needs: tools, modelling code of exports, the page of the report."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from megatron_ext.testing.tiny import tiny_model
from tests.support.checkpoints import write_checkpoint
from tests.support.waiting import HANGS
from tests.support.workspace import ROOT
from tests.unit.monitoring.reported_runs import write_metrics


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the wheel installed into it."""
    directory = tmp_path_factory.mktemp("wheel")
    # setuptools leaves build/ behind: it builds from a copy of the tracked and new files.
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in names.splitlines():
        if (ROOT / name).is_file():
            target = directory / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    run = [sys.executable, "-m"]
    subprocess.run(
        [*run, "build", "--wheel", "--no-isolation", "--outdir", directory, directory / "source"],
        check=True,
        capture_output=True,
    )
    (wheel,) = directory.glob("*.whl")
    subprocess.run([*run, "pip", "install", "--quiet", "--no-deps", "--target", directory / "site", wheel], check=True)
    return directory


def in_installed_copy(installed: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(installed / "site"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=installed,
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANGS,
    )


def test_the_wheel_is_the_package_and_the_tools(installed: Path) -> None:
    (wheel,) = installed.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"megatron_ext", next(top for top in tops if top.endswith(".dist-info"))}
    where = in_installed_copy(installed, "-c", "import megatron_ext; print(megatron_ext.__file__)").stdout
    assert str(installed / "site") in where
    tools = {path.name for path in (installed / "site" / "megatron_ext" / "tools").glob("*.py")}
    assert tools == {path.name for path in (ROOT / "tools").glob("*.py")}


def test_an_installed_copy_exports_verifies_and_reports(installed: Path) -> None:
    write_checkpoint(installed / "checkpoint", tiny_model(moe=True))
    exported = in_installed_copy(installed, "-m", "megatron_ext.tools.convert", "checkpoint", "hf")
    assert exported.returncode == 0, exported.stderr
    assert (installed / "hf" / "modeling_megatron_ext.py").is_file()
    verified = in_installed_copy(installed, "-m", "megatron_ext.tools.verify", "checkpoint", "hf")
    assert verified.returncode == 0, verified.stderr
    assert "verdict: the same model" in verified.stdout
    metrics = write_metrics(installed / "metrics.jsonl", 5, loss=3.0)
    reported = in_installed_copy(
        installed, "-m", "megatron_ext.tools.report", "--metrics", f"run={metrics}", "--output", "report.html"
    )
    assert reported.returncode == 0, reported.stderr
    assert "<title>" in (installed / "report.html").read_text()
