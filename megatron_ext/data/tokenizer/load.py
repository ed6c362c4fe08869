"""The tokenizer of a folder as transformers loads it, and what is wrong where it does not."""

import logging
import os
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
from megatron_ext.data.tokenizer.pieces import TIKTOKEN_LINE
from megatron_ext.errors import DataError
from megatron_ext.files import read_json_object
from megatron_ext.foreign import IS_LFS_POINTER, is_lfs_pointer, reading

log = logging.getLogger(__name__)

_TOKEN_KEYS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


def load_tokenizer(directory: str | Path, *, trust_remote_code: bool = False) -> Any:
    """Transformers' tokenizer of `directory`. An export of ours brings none of its own code, so none is run unasked.

    Raises:
        DataError: there is none, or none that transformers can use; it says what to do.
    """
    directory = Path(directory)
    _check_files(directory)
    read_by_one_thread()
    from transformers import AutoTokenizer  # slow to import

    with reading(directory, DataError, kind="a tokenizer", advice=_way_out(directory)):
        how = {"trust_remote_code": trust_remote_code, "local_files_only": True}
        return AutoTokenizer.from_pretrained(str(directory), **how, **_plain_tokens(directory))


def read_by_one_thread() -> None:
    """Let the library read by one thread: processes here read a text each.

    Threads would also warn wherever a process that reads data ahead is forked.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _plain_tokens(directory: Path) -> dict[str, Any]:
    """Special tokens that tokenizer_config.json describes without saying `__type`, which transformers does not take."""
    from tokenizers import AddedToken

    path = directory / SETTINGS_FILE
    settings = read_json_object(path, DataError) if path.is_file() else {}
    plain = {
        name: AddedToken(**{key: value for key, value in token.items() if key in _TOKEN_KEYS})
        for name, token in settings.items()
        if name.endswith("_token") and isinstance(token, dict) and "content" in token and "__type" not in token
    }
    if plain:
        log.warning(
            '%s: %s lack "__type": "AddedToken"; transformers alone would not load this tokenizer',
            path,
            ", ".join(plain),
        )
    return plain


def _check_files(directory: Path) -> None:
    """Raise DataError where the files are no tokenizer, as far as that shows without reading all of them."""
    wanted = " or ".join(TOKENIZERS)
    if not directory.is_dir():
        found = "no such folder; one of the Hugging Face hub: `hf download` it first"
        if directory.exists():
            found = "not a folder; give the one that holds the tokenizer's files"
        raise DataError(f"{directory}: no tokenizer here ({found})")
    files = tokenizer_files(directory)
    vocabularies = [name for name in files if any(name.match(pattern) for pattern in VOCABULARIES)]
    if not vocabularies and Path(SETTINGS_FILE) not in files:
        raise DataError(f"{directory}: no tokenizer here ({wanted})")
    for name in files:
        if is_lfs_pointer(directory / name):
            raise DataError(f"{directory / name}: {IS_LFS_POINTER}")
        if name in vocabularies and not (directory / name).stat().st_size:
            raise DataError(f"{directory / name}: is empty; download it again")


def _way_out(directory: Path) -> str:
    """What to do where transformers does not load the tokenizer of `directory`."""
    again = f"AutoTokenizer.from_pretrained('{directory}').save_pretrained('NEW')"
    for name in (SETTINGS_FILE, FAST_FILE):
        if not (directory / name).is_file():
            continue
        try:
            content = read_json_object(directory / name, DataError)
        except DataError:
            return f"{name} is damaged: download it again"
        if name == SETTINGS_FILE and content.get("auto_map"):
            return (
                f"it has code of its own, which is not run here; where you trust that, {again} with "
                f"trust_remote_code=True may write a {FAST_FILE} that needs none"
            )
    if (directory / FAST_FILE).is_file():
        here = ", ".join(f"{name} {version(name)}" for name in ("tokenizers", "transformers"))
        return (
            f"if a newer library wrote {FAST_FILE} than the ones here ({here}): "
            "pip install --upgrade tokenizers transformers"
        )
    if (directory / MODEL_FILE).is_file():
        with open(directory / MODEL_FILE, "rb") as file:
            if TIKTOKEN_LINE.match(file.readline(1000)):
                return f"{MODEL_FILE} is a tiktoken list: put the {FAST_FILE} of the same model beside it"
        return (
            f"if {MODEL_FILE} is a SentencePiece model, put the {SETTINGS_FILE} beside it that came with it, or see "
            f"what tools/tokenizer.py export {directory / MODEL_FILE} says"
        )
    return (
        f"put the {FAST_FILE} of the same model beside these files; where transformers loads them, {again} writes one"
    )
