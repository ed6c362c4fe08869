"""Memory that was freed is used again without the system's help, where malloc is glibc's."""

import ctypes
import os
import platform
import resource
import subprocess
import sys

import pytest

from megatron_ext.runtime.cpu_memory import keep_freed_memory

SIZE = 16 * 2**20
"""Bytes."""
GLIBC = platform.libc_ver()[0] == "glibc"


def pages_of_later_rounds(keep: bool) -> None:
    """Print how many pages the system hands out for 16 blocks of 16 MB after they were used and freed once.

    Of malloc itself: what else a process holds may lie behind a tensor and keep its memory from going back.
    """
    if keep:
        assert keep_freed_memory()
    libc = ctypes.CDLL(None)
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    pages = []
    for _ in range(4):
        held = [libc.malloc(SIZE) for _ in range(16)]
        for block in held:
            libc.memset(block, 1, SIZE)
        for block in held:
            libc.free(block)
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
    assert given_back > 0.99 * 3 * 16 * SIZE / resource.getpagesize()  # of each round but the end, 128 KB
    assert kept < 16


def test_what_the_environment_says_of_malloc_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert keep_freed_memory() is False
