"""A prepared dataset on disk: its description, its fingerprint, and the checks before it is read."""

import glob
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.data.indexed import check_index, token_dtype
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.data.tokenizer.record import check_record
from megatron_ext.errors import DataError
from megatron_ext.files import read_json_object
from megatron_ext.foreign import reading
from megatron_ext.manifest import check_manifest

DATASET_FILE = "dataset.json"
PREPARE_AGAIN = "prepare it with tools/preprocess.py, or take it from a copy"


@dataclass(frozen=True)
class SplitSummary:
    """One split of a prepared dataset."""

    documents: int
    tokens: int


def dataset_fingerprint(prefix: str | Path) -> str:
    """Changes when what stands at a position of the dataset at `prefix` could; moving the dataset leaves it alone.

    Raises:
        DataError: the dataset cannot be read.
    """
    prefix = Path(prefix)
    with reading(prefix.parent / DATASET_FILE, DataError, advice=PREPARE_AGAIN):
        description = (prefix.parent / DATASET_FILE).read_bytes()
    return hashlib.sha256(description + prefix.name.encode()).hexdigest()[:16]


def check_dataset(prefix: str | Path, tokenizer: Tokenizer) -> SplitSummary:
    """Check that the dataset at `prefix` is whole and was made with `tokenizer`, and return its size.

    Sizes are checked, not contents: `check_dataset_sums` reads them.

    Raises:
        DataError: says what does not match.
    """
    prefix = Path(prefix)
    description_file = prefix.parent / DATASET_FILE
    tokens, index = (prefix.with_name(prefix.name + ending) for ending in (".bin", ".idx"))
    for path in (tokens, index, description_file):
        if not path.is_file():
            raise DataError(f"{prefix}: {path.name} is missing{_other_splits(prefix)}; {PREPARE_AGAIN}")
    vocab_size, counts = described(description_file, prefix.name)
    check_record(read_json_object(description_file, DataError), tokenizer, prefix)
    names = (tokens.name, index.name, DATASET_FILE)
    check_manifest(prefix.parent, DataError, only=[glob.escape(name) for name in names], advice=PREPARE_AGAIN)
    dtype = token_dtype(vocab_size)
    expected, actual = counts.tokens * dtype.itemsize, tokens.stat().st_size
    if actual != expected:
        raise DataError(f"{tokens} has {actual} bytes, {DATASET_FILE} says {expected}: it changed after it was made")
    check_index(index, counts.documents, dtype)
    return counts


def check_dataset_sums(prefix: str | Path) -> None:
    """Compare the files of the dataset at `prefix` with their checksums, where it has a manifest; reads them.

    Raises:
        DataError: they are missing or changed.
    """
    prefix = Path(prefix)
    endings = ("bin", "idx", "mask", "weights")  # the last two of chat data alone
    names = (*(f"{prefix.name}.{ending}" for ending in endings), DATASET_FILE)
    only = [glob.escape(name) for name in names]
    check_manifest(prefix.parent, DataError, checksums=True, only=only, advice=PREPARE_AGAIN)


def described(description_file: Path, split: str) -> tuple[int, SplitSummary]:
    """Size of the tokenizer's vocabulary, and size of `split`, as dataset.json says them."""
    description = read_json_object(description_file, DataError)
    with reading(description_file, DataError, kind="what tools/preprocess.py writes", advice=PREPARE_AGAIN):
        counts = {key: _count(description["splits"][split][key]) for key in ("documents", "tokens")}
        return _count(description["vocab_size"]), SplitSummary(**counts)


def _count(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{value!r} is no number of documents or tokens")
    return value


def _other_splits(prefix: Path) -> str:
    found = sorted(path.stem for path in prefix.parent.glob("*.bin"))
    return f" (there is: {', '.join(found)})" if found else ""
