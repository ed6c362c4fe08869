"""The tokenizer of a folder as transformers loads it, and what is wrong where it does not."""

import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint.tokenizer_files import (
    FAST_FILE,
    MODEL_FILE,
    SETTINGS_FILE,
    TOKENIZERS,
    VOCABULARIES,
    tokenizer_files,
)
from megatron_ext.errors import DataError
from megatron_ext.files import read_json_object

_LFS_POINTER = b"version https://git-lfs"
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")


def load_tokenizer(directory: str | Path, *, trust_remote_code: bool = False) -> Any:
    """Transformers' tokenizer of `directory`. An export of ours brings none of its own code, so none is run unasked.

    Raises:
        DataError: there is none, or none that transformers can use; it says what to do.
    """
    directory = Path(directory)
    _check_files(directory)
    from transformers import AutoTokenizer  # slow to import

    try:
        return AutoTokenizer.from_pretrained(
            str(directory), trust_remote_code=trust_remote_code, local_files_only=True
        )
    except MemoryError:
        raise
    except BaseException as error:
        # Foreign parsers: the tokenizers library raises bare Exceptions, and panics that are no Exceptions.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = str(error).strip().partition("\n")[0]
        raise DataError(f"{directory}: its tokenizer cannot be read ({reason}); {_way_out(directory, error)}") from error


def _check_files(directory: Path) -> None:
    """Raise DataError where the files are no tokenizer, as far as that shows without reading all of them."""
    wanted = " or ".join(TOKENIZERS)
    if not directory.is_dir():
        raise DataError(f"{directory}: no tokenizer here ({'not a folder' if directory.exists() else 'no such folder'})")
    files = tokenizer_files(directory)
    vocabularies = [name for name in files if any(name.match(pattern) for pattern in VOCABULARIES)]
    if not vocabularies and Path(SETTINGS_FILE) not in files:
        raise DataError(f"{directory}: no tokenizer here ({wanted})")
    for name in files:
        with open(directory / name, "rb") as file:
            start = file.read(len(_LFS_POINTER))
        if start == _LFS_POINTER:
            raise DataError(
                f"{directory / name}: is a Git LFS pointer, not the file itself; fetch it by 'git lfs pull' in the "
                "repository, or download it again"
            )
        if not start and name in vocabularies:
            raise DataError(f"{directory / name}: is empty; download it again")


def _way_out(directory: Path, error: BaseException) -> str:
    """What to do about a tokenizer that transformers does not load."""
    if "trust_remote_code" in str(error):
        return (
            f"it needs code of its own, which is not run here; save it as {FAST_FILE} where you trust that code "
            "(transformers' save_pretrained of the fast tokenizer)"
        )
    if (directory / FAST_FILE).is_file():
        try:
            read_json_object(directory / FAST_FILE, DataError)
        except DataError:
            return f"{FAST_FILE} is damaged: download it again"
        newer = " ".join(f"{name} {version(name)}" for name in ("tokenizers", "transformers"))
        return (
            f"if a newer library wrote {FAST_FILE} than the ones here ({newer}): "
            "pip install --upgrade tokenizers transformers"
        )
    if (directory / MODEL_FILE).is_file():
        with open(directory / MODEL_FILE, "rb") as file:
            if _TIKTOKEN_LINE.match(file.readline(1000)):
                return f"{MODEL_FILE} is a tiktoken list: put the {FAST_FILE} of the same model beside it"
        return f"is {MODEL_FILE} a SentencePiece model? If so, tools/tokenizer.py export {directory / MODEL_FILE} says more"
    return (
        f"transformers makes a {FAST_FILE}: AutoTokenizer.from_pretrained('{directory}').save_pretrained('NEW'), where "
        "it loads at all"
    )
