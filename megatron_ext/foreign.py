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

LFS_POINTER = b"version https://git-lfs"
"""Begins the file that stands in a repository for one that Git LFS keeps."""
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
    except BaseException as fault:
        if not is_fault(fault):
            raise
        if is_lfs_pointer(path):
            raise error(f"{path}: {IS_LFS_POINTER}") from fault
        raise error(f"{path}: {fault_of(fault, kind)}{advice and '; '}{advice}") from fault


def is_fault(raised: BaseException) -> bool:
    """Whether it tells of something that went wrong, and not of Ctrl-C or an exit."""
    # Rust's panics arrive as PanicException, which is not even an Exception.
    return isinstance(raised, Exception) or type(raised).__name__ == "PanicException"


IS_LFS_POINTER = (
    "is a Git LFS pointer, not the file itself; fetch it by 'git lfs pull' in the repository, or download it again"
)


def is_lfs_pointer(path: str | Path) -> bool:
    """Whether the file at `path` is what a clone without Git LFS has in place of a large file."""
    try:
        if not Path(path).is_file():  # opening a pipe would wait
            return False
        with open(path, "rb") as file:
            return file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return False


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
