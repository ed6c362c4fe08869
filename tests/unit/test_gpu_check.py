"""The check of one GPU runs on CPU in tiny sizes: its parts stay in step with what they measure."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_its_checks_run_tiny_and_are_right(tmp_path: Path, repository: Path) -> None:
    environment = {**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable}
    command = ["bash", "benchmarks/gpu_check/gpu_check.sh", "--tiny", "--parts", "checks"]
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (answer,) = json.loads((tmp_path / "gpu_check.json").read_text()).values()
    found = answer["result"]
    assert "ended" not in found, done.stdout
    faults = {name: value for name, value in found.items() if isinstance(value, dict) and value.get("ok") is False}
    assert not faults
    # On CPU everything repeats.
    assert all(found[f"determinism, {mode}"]["all equal"] for mode in ("as it comes", "deterministic"))
