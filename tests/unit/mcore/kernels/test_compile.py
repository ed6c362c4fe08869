"""Every kernel becomes machine code for a GPU, which takes none: Triton brings compiler and assembler along."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed (pip install triton)")
def test_every_kernel_compiles_for_hopper(tmp_path: Path, repository: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(repository), environment.get("PYTHONPATH"))))
    script = Path(__file__).with_name("compile_for_gpus.py")
    done = subprocess.run([sys.executable, script, "90"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = json.loads(done.stdout)
    print(kernels)
    assert len(kernels) == 12
    for name, code in kernels.items():
        assert code["bytes"] > 0
        assert code["atomics"] == 0, name  # the order of every sum is fixed
        assert code["wide loads"] > 0, name  # 16 bytes a thread at a time
        assert (code["casts"] > 0) == name.startswith("cast")
        assert (code["tensor cores"] > 0) == name.startswith("grouped")
