"""Imported by every Python that starts with `Holds.environment`: waits at files that a test names."""

import os
import sys
import time
from pathlib import Path
from typing import Any

_FOLDER = Path(os.environ["MEGATRON_EXT_TEST_HOLDS"])


def _hold(event: str, arguments: tuple[Any, ...]) -> None:
    if event in ("open", "os.mkdir") and isinstance(arguments[0], str | os.PathLike):
        for name in str(arguments[0]).split(os.sep)[-2:]:
            while name and (_FOLDER / name).exists():
                time.sleep(0.02)


sys.addaudithook(_hold)
