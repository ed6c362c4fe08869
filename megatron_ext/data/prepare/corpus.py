"""Finds the files of a corpus, says what in a folder it leaves out, and cuts them into pieces for many processes."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.checkpoint.tokenizer_files import FAST_FILE, MODEL_FILE, SETTINGS_FILE
from megatron_ext.data.prepare.columns import row_groups
from megatron_ext.errors import DataError
from megatron_ext.files import UNFINISHED

PLAIN_ENDINGS, _COLUMN_ENDINGS = (".jsonl", ".json", ".txt"), (".parquet", ".arrow")
COMPRESSED = (".gz", ".zst")
READABLE = (
    ".jsonl (an object a line), .json (an array of objects, or objects) and .txt (a document), also as .gz and .zst, "
    ".parquet and .arrow"
)
_TOKENIZER = {FAST_FILE, MODEL_FILE, SETTINGS_FILE}
_DESCRIPTIONS = {"dataset.json", "manifest.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json"}
_OF_DATASETS = {"state.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json"}
_CACHE = "cache-"
"""How the datasets library begins the names of what it derived from the data beside it."""


@dataclass(frozen=True)
class Shard:
    """A byte range of a JSONL file (the lines that begin in it), a row group of Parquet, or a whole file.

    Attributes:
        start: its first byte, or about that.
        stop: the byte behind it, or about that.
        group: the number of the row group.
    """

    path: Path
    start: int
    stop: int
    group: int = 0


def corpus_files(inputs: Sequence[str | Path]) -> list[Path]:
    """The files of a corpus: those named, and every readable one below the folders named, sorted, links followed.

    What a folder holds and is not read is said in one line on stderr.

    Raises:
        DataError: nothing there, or a file of another kind.
    """
    files: list[Path] = []
    for entry in map(Path, inputs):
        if entry.is_dir():
            files.extend(_files_below(entry))
        elif entry.is_file():
            if ending_of(entry) is None:
                raise DataError(f"{entry}: expected {READABLE}")
            files.append(entry)
        elif entry.exists():
            raise DataError(f"{entry}: neither a file nor a folder")
        else:
            raise DataError(f"{entry}: no such file or folder")
    return files


def _files_below(folder: Path) -> list[Path]:
    found: list[Path] = []
    left_out: dict[str, list[Path]] = {}
    seen: set[str] = set()
    for directory, folders, names in os.walk(folder, followlinks=True, onerror=_raise):
        # Links may lead in circles, or twice to the same text.
        if _again(directory, seen):
            left_out.setdefault("already read by another name", []).append(Path(directory))
            folders.clear()
            continue
        folders.sort(key=lambda name: (os.path.islink(os.path.join(directory, name)), name))
        for name in [name for name in folders if name.endswith(UNFINISHED)]:
            folders.remove(name)
            left_out.setdefault("unfinished output", []).append(Path(directory, name))
        is_tokenizer = not _TOKENIZER.isdisjoint(names)
        of_datasets = set(names) & _OF_DATASETS if any(name.endswith(".arrow") for name in names) else set()
        for path in (Path(directory, name) for name in sorted(names)):
            if (why := _why_not_read(path, is_tokenizer, of_datasets, seen)) is None:
                found.append(path)
            else:
                left_out.setdefault(why, []).append(path)
    counts = [_count(why, paths, folder) for why, paths in sorted(left_out.items())]
    if not found:
        raise DataError(f"{folder}: nothing to read below ({', '.join(counts) or 'no files'}); expected {READABLE}")
    if counts:
        total = sum(map(len, left_out.values()))
        read = "1 file is read" if len(found) == 1 else f"{len(found)} files are read"
        print(f"{folder}: {read}, {total} left out: {', '.join(counts)}", file=sys.stderr)
    return sorted(found)


def _why_not_read(path: Path, is_tokenizer: bool, of_datasets: set[str], seen: set[str]) -> str | None:
    """Why the file `path` of a folder is no text of a corpus, or None."""
    if not path.exists():
        return "broken link"
    if not path.is_file():
        return "no regular file"
    ending = ending_of(path)
    if ending is None:
        return "".join(path.suffixes[-2:] if is_compressed(path) else path.suffixes[-1:]) or "without ending"
    # Data, tokenizers and corpora often stand in one folder.
    if path.name in _DESCRIPTIONS or path.name in of_datasets:
        return "description of data"
    if is_tokenizer and ending in (".json", ".txt"):
        return "of a tokenizer"
    if ending == ".arrow" and path.name.startswith(_CACHE):
        return "cache of the datasets library"
    return "already read by another name" if _again(path, seen) else None


def _again(path: str | Path, seen: set[str]) -> bool:
    real = os.path.realpath(path)
    if real in seen:
        return True
    seen.add(real)
    return False


def _count(why: str, paths: list[Path], folder: Path) -> str:
    return f"{len(paths)} {why} ({'such as ' if len(paths) > 1 else ''}{paths[0].relative_to(folder)})"


def _raise(error: OSError) -> None:
    raise error


def ending_of(path: Path) -> str | None:
    """What kind of corpus file `path` is by its name, without what compressed it, or None."""
    name = path.name.lower()
    inner = Path(name).stem if name.endswith(COMPRESSED) else name
    ending = Path(inner).suffix
    return ending if ending in PLAIN_ENDINGS or (ending in _COLUMN_ENDINGS and inner == name) else None


def is_compressed(path: Path) -> bool:
    """Whether a file has to be read from its beginning."""
    return path.suffix.lower() in COMPRESSED


def split_into_shards(files: Sequence[Path], shard_bytes: int) -> list[Shard]:
    """Cut `files` into shards of about `shard_bytes`, in order. Plain JSONL and Parquet can be entered within."""
    shards: list[Shard] = []
    for path in files:
        size = path.stat().st_size
        if ending_of(path) == ".parquet":
            groups = row_groups(path)
            shards.extend(Shard(path, size * n // groups, size * (n + 1) // groups, n) for n in range(groups))
            continue
        can_be_cut = ending_of(path) == ".jsonl" and not is_compressed(path)
        step = shard_bytes if can_be_cut else max(size, 1)
        shards.extend(Shard(path, start, min(start + step, size)) for start in range(0, size, step))
    return shards
