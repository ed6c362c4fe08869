"""Another process that holds a lock on a directory, for tests of two writers."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

HOLD = """
import contextlib, sys
from megatron_ext.locks import exclusive, exclusive_output, joined
with {lock}(sys.argv[1], "testing") as lock:
    if {share}:
        lock.share()
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def holder(directory: Path, lock: str = "exclusive", *, share: bool = False) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock until its input ends."""
    code = HOLD.format(lock=lock, share=share)
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    try:
        yield process
    finally:
        process.kill()
        process.communicate()
