"""Turns documents into token files for training: in parallel, resumable, split into train, validation and test.

Every document gets an end-of-document token and is assigned to a split by a hash of its text, so that the split does
not depend on order or number of processes, and copies of a document never stand in two splits.
"""

import hashlib
import json
import multiprocessing
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.data.corpus import Shard, corpus_files, read_shard, split_into_shards
from megatron_ext.data.indexed import concatenate, token_dtype, write_index
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.errors import DataError
from megatron_ext.files import UNFINISHED, output_place, publish_directory, read_json_object
from megatron_ext.locks import exclusive_output

MANIFEST_FILE = "dataset.json"
SPLITS = ("train", "validation", "test")
_CONTENTS = (MANIFEST_FILE, "*.bin", "*.idx")
_SHARD_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True)
class SplitSummary:
    """One split of a prepared dataset."""

    documents: int
    tokens: int


@dataclass(frozen=True)
class _Job:
    """What every shard of one preparation has in common."""

    work: Path
    tokenizer: Path
    text_key: str
    fractions: tuple[float, ...]


def preprocess(
    inputs: Sequence[str | Path],
    tokenizer_directory: str | Path,
    output: str | Path,
    *,
    text_key: str = "text",
    split: Sequence[float] = (0.98, 0.01, 0.01),
    workers: int = 1,
    force: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, SplitSummary]:
    """Tokenize the documents of `inputs` into `<output>/{train,validation,test}.{bin,idx}`.

    Interrupted, it continues with the shards that are missing; the output appears when it is complete.

    Args:
        split: shares of the three splits; a split without documents is not written.
        progress: told (bytes read, bytes in all).

    Raises:
        DataError: bad input, or an output that exists and `force` is not set.
    """
    files, tokenizer = corpus_files(inputs), Tokenizer(tokenizer_directory)
    output = output_place(output, DataError, force=force, contents=_CONTENTS, inputs=[*files, tokenizer.directory])
    fractions = _checked_fractions(split)
    work = output.with_name(output.name + UNFINISHED)
    plan = _plan(files, tokenizer, text_key, fractions)
    job = _Job(work, tokenizer.directory, text_key, fractions)
    with exclusive_output(output, "preparing data"):
        _continue_or_restart(work, plan)
        shards = split_into_shards(files, _SHARD_BYTES)
        _run_shards(job, shards, workers, progress)
        summary = _join(work, len(shards), token_dtype(tokenizer.vocab_size))
        splits = {name: asdict(counts) for name, counts in summary.items()}
        (work / MANIFEST_FILE).write_text(json.dumps({**plan, "splits": splits}, indent=2) + "\n")
        publish_directory(work, output, replace=force)
    return summary


def _checked_fractions(split: Sequence[float]) -> tuple[float, ...]:
    if len(split) != len(SPLITS) or any(share < 0 for share in split) or sum(split) <= 0:
        raise DataError(f"split = {list(split)}: expected three shares for {', '.join(SPLITS)}")
    return tuple(share / sum(split) for share in split)


def _plan(files: Sequence[Path], tokenizer: Tokenizer, text_key: str, fractions: tuple[float, ...]) -> dict[str, Any]:
    """Everything the result depends on."""
    return {
        "sources": [
            {"path": str(p.resolve()), "bytes": p.stat().st_size, "modified": p.stat().st_mtime_ns} for p in files
        ],
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod,
        "text_key": text_key,
        "split": list(fractions),
    }


def _continue_or_restart(work: Path, plan: dict[str, Any]) -> None:
    """Keep finished shards of an interrupted preparation if nothing it depends on has changed."""
    plan_file = work / "plan.json"
    if work.exists() and (not plan_file.is_file() or json.loads(plan_file.read_text()) != plan):
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    plan_file.write_text(json.dumps(plan))


def _run_shards(job: _Job, shards: list[Shard], workers: int, progress: Callable[[int, int], None]) -> None:
    total = sum(shard.stop - shard.start for shard in shards)
    missing = [(n, shard) for n, shard in enumerate(shards) if not _done_marker(job.work, n).exists()]
    done = total - sum(shard.stop - shard.start for _, shard in missing)
    progress(done, total)
    if workers == 1 or len(missing) <= 1:
        _open_tokenizer(job.tokenizer)
        for number, shard in missing:
            _tokenize_shard(job, number, shard)
            done += shard.stop - shard.start
            progress(done, total)
        return
    # forkserver: worker processes must not inherit threads or locks of the parent.
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(workers, context, _open_tokenizer, (job.tokenizer,)) as pool:
        running = {pool.submit(_tokenize_shard, job, number, shard): shard for number, shard in missing}
        try:
            for finished in as_completed(running):
                finished.result()
                done += running[finished].stop - running[finished].start
                progress(done, total)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


_tokenizer: Tokenizer | None = None


def _open_tokenizer(directory: Path) -> None:
    """Load the tokenizer once a process."""
    global _tokenizer
    _tokenizer = Tokenizer(directory)


def _tokenize_shard(job: _Job, number: int, shard: Shard) -> None:
    """Write the tokens and document lengths of one shard, split by split."""
    assert _tokenizer is not None
    dtype = token_dtype(_tokenizer.vocab_size)
    tokens: dict[str, list[np.ndarray]] = {name: [] for name in SPLITS}
    for text in read_shard(shard, job.text_key):
        if text:
            ids = np.array([*_tokenizer.encode(text), _tokenizer.eod], dtype=dtype)
            tokens[_split_of(text, job.fractions)].append(ids)
    for name, documents in tokens.items():
        part = _part(job.work, number, name)
        part.write_bytes(b"".join(ids.tobytes() for ids in documents))
        np.save(part.with_suffix(".npy"), np.array([len(ids) for ids in documents], dtype=np.int64))
    _done_marker(job.work, number).touch()


def _split_of(text: str, fractions: tuple[float, ...]) -> str:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    draw = int.from_bytes(digest, "little") / 2**64
    for name, share in zip(SPLITS, fractions, strict=True):
        if draw < share:
            return name
        draw -= share
    return next(name for name, share in zip(reversed(SPLITS), reversed(fractions), strict=True) if share > 0)


def _part(work: Path, number: int, split: str) -> Path:
    return work / f"part-{number:06d}-{split}.bin"


def _done_marker(work: Path, number: int) -> Path:
    return work / f"part-{number:06d}.done"


def _join(work: Path, num_shards: int, dtype: np.dtype[np.generic]) -> dict[str, SplitSummary]:
    """Join the parts of every split and remove them."""
    summary = {}
    for name in SPLITS:
        parts = [_part(work, number, name) for number in range(num_shards)]
        lengths = np.concatenate([np.load(part.with_suffix(".npy")) for part in parts])
        if len(lengths):
            concatenate(parts, work / f"{name}.bin")
            write_index(work / f"{name}.idx", lengths, dtype)
            summary[name] = SplitSummary(len(lengths), int(lengths.sum()))
    if not summary:
        raise DataError("the corpus has no text")
    # Markers first: interrupted here, the next run must not believe in parts that are gone.
    for pattern in ("part-*.done", "part-*", "plan.json"):
        for leftover in work.glob(pattern):
            leftover.unlink()
    return summary


def dataset_fingerprint(prefix: str | Path) -> str:
    """Changes when what stands at a position of the dataset at `prefix` could; moving the dataset leaves it alone."""
    prefix = Path(prefix)
    return hashlib.sha256((prefix.parent / MANIFEST_FILE).read_bytes() + prefix.name.encode()).hexdigest()[:16]


def check_dataset(prefix: str | Path, tokenizer: Tokenizer) -> SplitSummary:
    """Check that the dataset at `prefix` is whole and was made with `tokenizer`, and return its size.

    Raises:
        DataError: says what does not match.
    """
    prefix = Path(prefix)
    manifest_file = prefix.parent / MANIFEST_FILE
    for path in (prefix.with_name(prefix.name + ".bin"), prefix.with_name(prefix.name + ".idx"), manifest_file):
        if not path.is_file():
            raise DataError(f"{prefix}: {path.name} is missing; prepare it with tools/preprocess.py")
    manifest = read_json_object(manifest_file, DataError)
    if manifest["tokenizer"] != tokenizer.fingerprint:
        raise DataError(f"{prefix} was made with another tokenizer than {tokenizer.directory}; prepare it again")
    counts = SplitSummary(**manifest["splits"][prefix.name])
    expected = counts.tokens * token_dtype(manifest["vocab_size"]).itemsize
    actual = prefix.with_name(prefix.name + ".bin").stat().st_size
    if actual != expected:
        raise DataError(f"{prefix}.bin has {actual} bytes, its manifest says {expected}: it changed after it was made")
    return counts
