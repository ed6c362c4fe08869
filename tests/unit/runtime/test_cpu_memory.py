"""Memory that was freed is used again without the system's help, where malloc is glibc's."""

import os
import platform
import resource
import subprocess
import sys

import pytest
import torch

from megatron_ext.runtime.cpu_memory import keep_freed_memory

GLIBC = platform.libc_ver()[0] == "glibc"


def pages_of_later_rounds(keep: bool) -> None:
    """Print how many pages the system hands out for 16 tensors of 16 MB after they were made and freed once."""
    if keep:
        assert keep_freed_memory()
    pages = []
    for _ in range(4):
        held = [torch.ones(2**22) for _ in range(16)]
        del held
        pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    print(pages[-1] - pages[0])


def in_a_new_process(keep: bool) -> int:
    code = f"from tests.unit.runtime.test_cpu_memory import *; pages_of_later_rounds({keep})"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(not GLIBC, reason="malloc is not glibc's")
def test_freed_memory_is_used_again() -> None:
    given_back, kept = in_a_new_process(False), in_a_new_process(True)
    print(f"{given_back} pages handed out anew, {kept} where they are kept")
    # 256 MB are 65536 pages of 4 KB. The first round leaves a place that is short of one tensor by its alignment.
    assert kept < given_back / 10


def test_what_the_environment_says_of_malloc_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert keep_freed_memory() is False
