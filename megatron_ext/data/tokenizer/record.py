"""What prepared data says of the tokenizer that made it, and the comparison with a tokenizer that it is read with."""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint.tokenizer_files import FAST_FILE, MODEL_FILE
from megatron_ext.data.indexed import token_dtype
from megatron_ext.data.tokenizer.reading import Tokenizer
from megatron_ext.errors import DataError

log = logging.getLogger(__name__)


def record_of(tokenizer: Tokenizer) -> dict[str, Any]:
    """What token files depend on of the tokenizer that makes them, for dataset.json."""
    return {
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod,
        "eod_token": tokenizer.eod_token,
        "dtype": token_dtype(tokenizer.vocab_size).name,
    }


def check_record(record: Mapping[str, Any], tokenizer: Tokenizer, prefix: str | Path) -> None:
    """Check that `record`, of the data at `prefix`, is of `tokenizer`.

    Raises:
        DataError: it is not; it says in what, and what to do.
    """
    eod = record.get("eod")
    if eod is not None and eod != tokenizer.eod:
        spelt = f" ({record['eod_token']!r})" if "eod_token" in record else ""
        raise DataError(
            f"{prefix}: its documents end with token {eod}{spelt}, but those of {tokenizer.directory} end with "
            f"{tokenizer.eod} ({tokenizer.eod_token!r}); set eos_token there to what it was, or prepare the data again"
        )
    made_by = record.get("tokenizer")
    if isinstance(made_by, str) and made_by.startswith("ids-"):
        if made_by != tokenizer.fingerprint:
            raise DataError(
                f"{prefix} was made with another tokenizer than {tokenizer.directory}, or transformers reads that "
                "otherwise now; give data.tokenizer the one it was made with, or prepare the data again"
            )
        return
    _check_older(made_by, record, tokenizer, prefix)


def _check_older(made_by: Any, record: Mapping[str, Any], tokenizer: Tokenizer, prefix: str | Path) -> None:
    """Check what data of before knows: the bytes of the tokenizer's file, where it was ours, and its vocabulary."""
    if made_by is not None and made_by != _older_fingerprint(tokenizer.directory):
        raise DataError(f"{prefix} was made with another tokenizer than {tokenizer.directory}; prepare it again")
    if made_by is not None and _cut_off(tokenizer.directory):
        raise DataError(
            f"{prefix}: an older version made it, which cut documents where {FAST_FILE} says so (truncation); "
            "prepare it again"
        )
    size = record.get("vocab_size")
    if isinstance(size, int) and size > tokenizer.vocab_size:
        raise DataError(
            f"{prefix} was made with {size} tokens, but {tokenizer.directory} has {tokenizer.vocab_size}; it is "
            "another tokenizer: prepare the data again"
        )
    log.warning(
        "%s: made before data kept its whole tokenizer; what it says of it fits %s (added tokens, and special tokens "
        "spelt out in documents, were read otherwise then: prepare it again where there are such)",
        prefix,
        tokenizer.directory,
    )


def _older_fingerprint(directory: Path) -> str | None:
    for name in (MODEL_FILE, FAST_FILE):
        if (directory / name).is_file():
            return hashlib.sha256((directory / name).read_bytes()).hexdigest()[:16]
    return None


def _cut_off(directory: Path) -> bool:
    """Whether what the older version read stores a truncation."""
    if (directory / MODEL_FILE).is_file() or not (directory / FAST_FILE).is_file():
        return False
    return json.loads((directory / FAST_FILE).read_text(encoding="utf-8")).get("truncation") is not None
