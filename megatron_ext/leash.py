"""Runs a shell command that does not outlive the process that asked for it: python leash.py PARENT_PID COMMAND.

It imports nothing of the package, so that it starts at once and needs no memory to speak of.
"""

import contextlib
import os
import signal
import subprocess
import sys
from types import FrameType

_LOOK, _GRACE = 0.5, 5.0
"""Seconds between two looks at the parent, and those that the command has to end."""


def main() -> int:
    """Run the command with less priority than its parent's; its exit code."""
    parent, command = int(sys.argv[1]), sys.argv[2]
    signal.signal(signal.SIGTERM, _leave)
    os.nice(10)
    child = None
    try:
        child = subprocess.Popen(["/bin/sh", "-c", command], stdin=subprocess.DEVNULL, start_new_session=True)
        while os.getppid() == parent:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return child.wait(_LOOK)
        return 1
    finally:
        if child is not None:
            _end(child)


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _end(child: "subprocess.Popen[bytes]") -> None:
    """End the command, where it goes on, and whatever it has left running."""
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_GRACE)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)


if __name__ == "__main__":
    code = main()
    sys.exit(code if code >= 0 else 128 - code)
