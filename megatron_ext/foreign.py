"""The one place that knows what parsers of foreign files raise: whatever it is, people get one message.

Files come cut, flipped, nested ten thousand deep, from other tools and from people who mean harm. Their parsers (json,
YAML, pickle, zip, torch.load, Rust's tokenizers, matplotlib's fonts) fail in as many ways. Whoever reads such a file
does it inside `reading`:

    with reading(path, DataError):
        vocabulary = Tokenizer.from_file(str(path))
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from megatron_ext.errors import MegatronExtError

_MOST_CHARACTERS = 300


@contextlib.contextmanager
def reading(path: str | Path, error: type[MegatronExtError], *, kind: str = "", advice: str = "") -> Iterator[None]:
    """Turn whatever goes wrong inside into one `error` that names the file at `path`.

    Errors that are already written for people pass as they are, and so do Ctrl-C and exits. Keep the block small: a
    mistake of our own inside it would be taken for one of the file.

    Args:
        kind: what the file should have been ("JSON"), for the message.
        advice: the way out, as a clause after the fault ("take it from the model's page again").
    """
    try:
        yield
    except MegatronExtError:
        raise
    except Exception as fault:
        raise error(f"{path}: {fault_of(fault, kind)}{advice and '; '}{advice}") from fault
    except BaseException as fault:
        if type(fault).__name__ != "PanicException":  # how Rust's panics arrive: not even an Exception
            raise
        raise error(f"{path}: {fault_of(fault, kind)}{advice and '; '}{advice}") from fault


def fault_of(fault: BaseException, kind: str = "") -> str:
    """What went wrong in reading a file, in one line of bounded length."""
    if isinstance(fault, OSError) and fault.strerror:
        return fault.strerror
    lines = str(fault).strip().splitlines()
    said = lines[0].strip().rstrip(".:") if lines else ""
    if isinstance(fault, RecursionError):
        said = "it is nested too deeply"
    elif isinstance(fault, MemoryError):
        said = "it asks for more memory than there is"
    elif isinstance(fault, UnicodeDecodeError):
        said = f"not UTF-8 at byte {fault.start}"
    elif isinstance(fault, KeyError):
        said = f"{said} is missing"
    elif isinstance(fault, EOFError) and not said:
        said = "it ends too early"
    said = said if len(said) <= _MOST_CHARACTERS else f"{said[:_MOST_CHARACTERS]}..."
    return f"cannot be read{kind and ' as '}{kind} ({said or type(fault).__name__})"
