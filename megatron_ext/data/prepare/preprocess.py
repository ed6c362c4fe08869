"""Turns documents into token files for training: in parallel, resumable, split into train, validation and test.

Every document gets an end-of-document token and is assigned to a split by a hash of its text, so that the split does
not depend on order or number of processes, and copies of a document never stand in two splits.
"""

import hashlib
import json
import logging
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.data.dataset import MANIFEST_FILE, PREPARE_AGAIN, SplitSummary, described
from megatron_ext.data.indexed import token_dtype, write_index, write_synced
from megatron_ext.data.prepare.corpus import Shard, corpus_files, read_shard, split_into_shards
from megatron_ext.data.prepare.encoder import Encoder, encoder_for
from megatron_ext.data.prepare.parts import Part, join_lengths, join_tokens
from megatron_ext.data.prepare.workers import run_in_processes
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.data.tokenizer.record import record_of
from megatron_ext.errors import DataError
from megatron_ext.files import (
    OURS,
    output_place,
    publish_directory,
    read_json_object,
    remove_unfinished,
    start_directory,
    unfinished_place,
)
from megatron_ext.locks import exclusive_output
from megatron_ext.manifest import MANIFEST_FILE as SUMS_FILE
from megatron_ext.manifest import FileSum, check_manifest, write_manifest

log = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
_CONTENTS = (MANIFEST_FILE, "*.bin", "*.idx", SUMS_FILE)
_PLAN_FILE, _JOINED = "plan.json", "joined"
_SHARD_BYTES = 4 * 1024 * 1024
_BATCH_CHARACTERS = 1 << 18


@dataclass(frozen=True)
class _Job:
    """What every shard of one preparation has in common."""

    work: Path
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
    fractions = _checked_fractions(split)
    plan = _plan(files, tokenizer, text_key, fractions)
    if (done := _published(Path(output), plan)) is not None:
        return done
    output = output_place(output, DataError, force=force, contents=_CONTENTS, inputs=[*files, tokenizer.directory])
    work = unfinished_place(output)
    job = _Job(work, text_key, fractions)
    shards = split_into_shards(files, _SHARD_BYTES)
    with exclusive_output(output, "preparing data"):
        _continue_or_restart(output, plan)
        with _writing(work):
            _run_shards(job, tokenizer, shards, workers, progress)
            summary = _join(work, len(shards), plan, token_dtype(tokenizer.vocab_size))
        publish_directory(work / _JOINED, output, replace=force)
        remove_unfinished(work)
    return summary


def _checked_fractions(split: Sequence[float]) -> tuple[float, ...]:
    # Shares that are not numbers make a total that is not either.
    if len(split) != len(SPLITS) or any(share < 0 for share in split) or not 0 < sum(split) < math.inf:
        raise DataError(f"split = {list(split)}: expected three shares, of 0 or more, for {', '.join(SPLITS)}")
    return tuple(share / sum(split) for share in split)


@contextmanager
def _writing(work: Path) -> Iterator[None]:
    """Inside, a disk that is full or faulty ends with one message."""
    try:
        yield
    except OSError as error:
        why = f"{error.filename or work}: cannot be written ({error.strerror or error})"
        raise DataError(f"{why}; what is done is kept in {work}: start the same command again to go on") from error


def _plan(files: Sequence[Path], tokenizer: Tokenizer, text_key: str, fractions: tuple[float, ...]) -> dict[str, Any]:
    """Everything the result depends on."""
    return {
        "sources": [
            {"path": str(p.resolve()), "bytes": p.stat().st_size, "modified": p.stat().st_mtime_ns} for p in files
        ],
        **record_of(tokenizer),
        "text_key": text_key,
        "split": list(fractions),
    }


def _continue_or_restart(output: Path, plan: dict[str, Any]) -> None:
    """Keep finished shards of an interrupted preparation if nothing it depends on has changed."""
    work = unfinished_place(output)
    plan = {**plan, "shard_bytes": _SHARD_BYTES}
    if (work / OURS).is_file() and not work.is_symlink():
        if (begun := _plan_of(work)) == plan:
            shutil.rmtree(work / _JOINED, ignore_errors=True)
            return
        if begun is not None:
            print(f"{work}: begun with other text, tokenizer or options; starts anew", file=sys.stderr)
    start_directory(output)
    write_synced(work / _PLAN_FILE, json.dumps(plan).encode())


def _published(output: Path, plan: dict[str, Any]) -> dict[str, SplitSummary] | None:
    """What a preparation of the same `plan` made that was killed when all was published but its parts not yet removed.

    They are removed. None where there is no such thing: a complete output alone is none of our business.
    """
    work = unfinished_place(output.resolve() if output.is_symlink() else output)
    if not (output / MANIFEST_FILE).is_file() or not (work / OURS).is_file():
        return None
    with exclusive_output(output, "preparing data"):
        content = read_json_object(output / MANIFEST_FILE, DataError)
        splits = content.pop("splits", None)
        if content != plan or not isinstance(splits, dict):
            return None
        check_manifest(output, DataError, checksums=True, advice=PREPARE_AGAIN)
        remove_unfinished(work)
    return {name: described(output / MANIFEST_FILE, name)[1] for name in splits}


def _plan_of(work: Path) -> dict[str, Any] | None:
    if not (work / _PLAN_FILE).is_file():
        return None
    try:
        return read_json_object(work / _PLAN_FILE, DataError)
    except DataError:
        return {}  # damaged: nothing there can be believed


def _run_shards(
    job: _Job, tokenizer: Tokenizer, shards: list[Shard], workers: int, progress: Callable[[int, int], None]
) -> None:
    total = sum(shard.stop - shard.start for shard in shards)
    missing = [(n, shard) for n, shard in enumerate(shards) if not Part(job.work, n).is_done()]
    done = total - sum(shard.stop - shard.start for _, shard in missing)
    progress(done, total)
    if workers == 1 or len(missing) <= 1:
        _open_tokenizer(tokenizer, job.work)
        finished: Iterator[tuple[int, Shard]] = (_tokenized(job, task) for task in missing)
    else:
        finished = run_in_processes(
            partial(_tokenized, job),
            missing,
            workers,
            start=partial(_open_tokenizer, tokenizer, job.work),
            describe=_description,
        )
    for _, shard in finished:
        done += shard.stop - shard.start
        progress(done, total)


def _description(task: tuple[int, Shard]) -> str:
    shard = task[1]
    return f"{shard.path}, bytes {shard.start} to {shard.stop}; start the same command again to go on"


_tokenizer: Tokenizer | None = None
_encoder: Encoder | None = None


def _open_tokenizer(tokenizer: Tokenizer, work: Path) -> None:
    """Give this process the tokenizer that was loaded once: that takes seconds."""
    global _tokenizer, _encoder
    _tokenizer, _encoder = tokenizer, encoder_for(tokenizer, partial(_say_spelt, tokenizer, work / "spelt"))


def _tokenized(job: _Job, task: tuple[int, Shard]) -> tuple[int, Shard]:
    with _writing(job.work):
        _tokenize_shard(job, *task)
    return task


def _tokenize_shard(job: _Job, number: int, shard: Shard) -> None:
    """Write the tokens and document lengths of one shard, split by split."""
    texts = (text for text in read_shard(shard, job.text_key) if text)
    Part(job.work, number).write(_documents(job, texts), SPLITS)


def _documents(job: _Job, texts: Iterator[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Split and token ids, with the end, of each text."""
    assert _tokenizer is not None
    assert _encoder is not None
    while batch := _batch(texts):
        ids = _encoder.encode(batch)
        ends = np.flatnonzero(ids == _tokenizer.eod) + 1
        assert len(ends) == len(batch), "the token that ends documents is in no text"
        for text, document in zip(batch, np.split(ids, ends[:-1]), strict=True):
            yield _split_of(text, job.fractions), document


def _batch(texts: Iterator[str]) -> list[str]:
    """The next texts, about as many as are encoded at once."""
    batch: list[str] = []
    size = 0
    while size < _BATCH_CHARACTERS and (text := next(texts, None)) is not None:
        batch.append(text)
        size += len(text)
    return batch


def _say_spelt(tokenizer: Tokenizer, said: Path, texts: Sequence[str]) -> None:
    """Say once that a text spells out a special token, in whichever process meets it first."""
    if said.exists():
        return
    for text in texts:
        if mark := tokenizer.spells(text):
            said.touch()
            log.warning(
                "a document spells out the special token %r: in documents that is text, not the token itself. A corpus "
                "of conversations needs them as tokens; plain text does not",
                mark,
            )
            return


def _split_of(text: str, fractions: tuple[float, ...]) -> str:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    draw = int.from_bytes(digest, "little") / 2**64
    for name, share in zip(SPLITS, fractions, strict=True):
        if draw < share:
            return name
        draw -= share
    return next(name for name, share in zip(reversed(SPLITS), reversed(fractions), strict=True) if share > 0)


def _join(work: Path, num_shards: int, plan: dict[str, Any], dtype: np.dtype[np.generic]) -> dict[str, SplitSummary]:
    """Join the parts of every split to the finished directory, and describe it."""
    parts = [Part(work, number) for number in range(num_shards)]
    output = work / _JOINED
    output.mkdir()
    summary: dict[str, SplitSummary] = {}
    sums: dict[str, FileSum] = {}
    for name in SPLITS:
        lengths = join_lengths(parts, name)
        if len(lengths):
            sums[f"{name}.bin"] = join_tokens(parts, name, output / f"{name}.bin")
            write_index(output / f"{name}.idx", lengths, dtype)
            summary[name] = SplitSummary(len(lengths), int(lengths.sum()))
    if not summary:
        files = [source["path"] for source in plan["sources"]]
        more = f" and {len(files) - 1} more" if len(files) > 1 else ""
        raise DataError(f"{files[0]}{more}: no text there, all documents are empty")
    splits = {name: asdict(counts) for name, counts in summary.items()}
    write_synced(output / MANIFEST_FILE, (json.dumps({**plan, "splits": splits}, indent=2) + "\n").encode())
    write_manifest(output, sums)
    return summary
