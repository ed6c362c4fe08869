"""Loads a tokenizer in a process of its own, without torch: a command that reads text then holds no transformers.

Where torch is, transformers loads it for whatever it is asked, which takes longer than all the rest. No tokenizer has a
use for it, but it cannot be hidden from a process that may need models later.
"""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

from megatron_ext.data.tokenizer.reading import Tokenizer

_PROGRAM = f"import json, sys; sys.path[:] = json.loads(sys.argv[1]); import {__name__}; {__name__}.send(sys.argv[2])"


def tokenizer_apart(directory: str | Path) -> Tokenizer:
    """The `Tokenizer` of a directory, for less time and memory where transformers is not loaded here yet.

    Raises:
        DataError: see there.
    """
    found = None if "transformers" in sys.modules else received(directory)
    return Tokenizer(directory) if found is None else found


def received(directory: str | Path) -> Tokenizer | None:
    """The tokenizer of a directory from a process of its own; None where that failed, or had something to say."""
    call = [sys.executable, "-P", "-c", _PROGRAM, json.dumps(sys.path), str(directory)]
    done = subprocess.run(call, stdin=subprocess.DEVNULL, capture_output=True)
    return pickle.loads(done.stdout) if done.returncode == 0 and done.stdout and not done.stderr else None


def send(directory: str) -> None:
    """What that process does: it writes the tokenizer to its standard output, where it needs no transformers."""
    result = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    sys.modules["torch"] = None  # type: ignore[assignment] # as Python marks what cannot be imported
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
    import transformers  # noqa: F401 - says that there is no torch

    del os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"]
    tokenizer = Tokenizer(directory)
    if tokenizer.fast is not None:
        with open(result, "wb") as file:
            pickle.dump(tokenizer, file)
