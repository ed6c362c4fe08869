"""Turns documents into token files for training: in parallel, resumable, split into train, validation and test.

Every document gets an end-of-document token and is assigned to a split by a hash of its text, so that the split does
not depend on order or number of processes, and copies of a document never stand in two splits.
"""

import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.data.dataset import DATASET_FILE, PREPARE_AGAIN, SplitSummary, described
from megatron_ext.data.indexed import write_synced
from megatron_ext.data.prepare.corpus import PLAIN_ENDINGS, corpus_files, ending_of, is_compressed, split_into_shards
from megatron_ext.data.prepare.faults import say_left_out
from megatron_ext.data.prepare.filters import fingerprint_of
from megatron_ext.data.prepare.join import MOST_FILES, check_parts, find_copies, join_split
from megatron_ext.data.prepare.parts import Told
from megatron_ext.data.prepare.preparation import PLAIN_TEXT, Preparation, Worker
from megatron_ext.data.prepare.shard_work import SPLITS, Task, TextOptions
from megatron_ext.data.prepare.workers import Processes
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
from megatron_ext.manifest import MANIFEST_FILE, FileSum, check_manifest, write_manifest

DROPPED_FILE = "dropped.jsonl"
_CONTENTS = (DATASET_FILE, "*.bin", "*.idx", MANIFEST_FILE, DROPPED_FILE)
_PLAN_FILE, _JOINED = "plan.json", "joined"
_SHARD_BYTES, _LARGEST_SHARD_BYTES, _SHARDS = 1 << 20, 1 << 26, 256
_BUCKET_BYTES = 1 << 26
_MOST_HERE = 1 << 20
"""Bytes of text that one worker reads within the command, sooner than another process begins. That one never holds
transformers, which the command does where a tokenizer is Python code: half of what a process may take."""
_EXPANDS = 5
"""How many times its size a compressed file is about."""
_SAMPLES = 100
"""Documents of each reason that are kept of those left out."""
_RESULTS = ("splits", "files", "left_out", "first_bad_lines", "read")
"""What dataset.json says of the result, beside what that depends on."""

Progress = Callable[[int, int, str], None]


def preprocess(
    inputs: Sequence[str | Path],
    tokenizer_directory: str | Path,
    output: str | Path,
    *,
    how: Preparation = PLAIN_TEXT,
    options: TextOptions | None = None,
    text_key: str = "text",
    split: Sequence[float] = (0.98, 0.01, 0.01),
    workers: int = 1,
    force: bool = False,
    progress: Progress = lambda done, total, note: None,
) -> dict[str, SplitSummary]:
    """Tokenize the documents of `inputs` into `<output>/{train,validation,test}.{bin,idx}`.

    Interrupted, it continues with the shards that are missing; the output appears when it is complete.

    Args:
        how: what is made of the documents.
        options: all choices about the text; `text_key` and `split` are two of them, for short, and stand above it.
        split: shares of the three splits; a split without documents is not written.
        progress: told (bytes read, bytes in all, documents and tokens so far).

    Raises:
        DataError: bad input, or an output that exists and `force` is not set.
    """
    files = corpus_files(inputs)
    tasks = _tasks(files)
    options = options or TextOptions(text_key=text_key, split=tuple(split))
    options = replace(options, split=_checked_fractions(options.split))
    if options.max_characters is not None and options.min_characters > options.max_characters:
        lengths = f"min_characters = {options.min_characters}, max_characters = {options.max_characters}"
        raise DataError(f"{lengths}: no document is as long as the one and as short as the other; lower the first")
    with _processes(tasks, workers, how) as processes:  # they begin while the tokenizer is loaded
        tokenizer = how.tokenizer(tokenizer_directory)
        plan = {**_plan(files, tokenizer, options), **how.describe(tokenizer)}
        if (done := _published(Path(output), plan)) is not None:
            return done
        contents = (*_CONTENTS, *how.contents)
        output = output_place(output, DataError, force=force, contents=contents, inputs=[*files, tokenizer.directory])
        work = unfinished_place(output)
        with exclusive_output(output, "preparing data"):
            _continue_or_restart(output, plan)
            with _writing(work):
                _run_shards(work, how, options, tokenizer, tasks, processes, progress)
                _check_unchanged(tasks)
                summary = _join(work, tasks, plan, how, options, tokenizer)
            publish_directory(work / _JOINED, output, replace=force)
            remove_unfinished(work)
    return summary


def _processes(tasks: Sequence[Task], workers: int, how: Preparation) -> AbstractContextManager[Processes | None]:
    """What does the shards; None: the command itself."""
    count, is_little = min(workers, len(tasks)), sum(map(_size_in_memory, tasks)) <= _MOST_HERE
    if count <= 1 and is_little:
        return nullcontext()
    return Processes(max(count, 1), _load_nothing if is_little else how.load)


def _load_nothing() -> None:
    """Loading ahead takes longer than little text does."""


def _tasks(files: Sequence[Path]) -> list[Task]:
    total = sum(path.stat().st_size for path in files)
    size = min(_SHARD_BYTES << (total // _SHARDS // _SHARD_BYTES).bit_length(), _LARGEST_SHARD_BYTES)
    if len(files) > MOST_FILES:
        raise DataError(f"{len(files):,} files: expected at most {MOST_FILES:,}; join some, or prepare them in turns")
    return [
        Task(file, number, shard, state)
        for file, (path, state) in enumerate((path, _state(path)) for path in files)
        for number, shard in enumerate(split_into_shards([path], size))
    ]


def _state(path: Path) -> tuple[int, int]:
    """See `Task.state`."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _check_unchanged(tasks: Sequence[Task]) -> None:
    """Raise DataError where a file changed since its shards were cut: some are of the one text, some of the other."""
    for path, state in {task.shard.path: task.state for task in tasks}.items():
        if not path.is_file() or _state(path) != state:
            advice = "start the same command again when it is whole: its shards are made anew, the others are kept"
            raise DataError(f"{path}: changed while it was read; {advice}")


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


def _plan(files: Sequence[Path], tokenizer: Tokenizer, options: TextOptions) -> dict[str, Any]:
    """Everything the result depends on."""
    chosen = asdict(options)
    filters = [{"filter": name, "code": fingerprint_of(name)} for name in options.filters]
    return {
        "sources": [
            {"path": str(p.resolve()), "bytes": p.stat().st_size, "modified": p.stat().st_mtime_ns} for p in files
        ],
        **record_of(tokenizer),
        **chosen,
        "split": list(options.split),
        "filters": filters,
    }


def _continue_or_restart(output: Path, plan: dict[str, Any]) -> None:
    """Keep the shards of an interrupted preparation, but for those of files that changed, if all else is the same."""
    work = unfinished_place(output)
    plan = {**plan, "parts": 3}
    if (work / OURS).is_file() and not work.is_symlink():
        begun = _plan_of(work)
        # Shards that were done when the first bad line ended it have none.
        others = {**(begun or {}), "sources": plan["sources"]}  # each part knows what it is made of
        if others in (plan, {**plan, "bad_lines": "stop"}):
            shutil.rmtree(work / _JOINED, ignore_errors=True)
            if begun != plan:
                write_synced(work / _PLAN_FILE, json.dumps(plan).encode())
            return
        if begun is not None:
            print(f"{work}: begun with another tokenizer or other options; starts anew", file=sys.stderr)
    start_directory(output)
    write_synced(work / _PLAN_FILE, json.dumps(plan).encode())


def _published(output: Path, plan: dict[str, Any]) -> dict[str, SplitSummary] | None:
    """What a preparation of the same `plan` made that was killed when all was published but its parts not yet removed.

    They are removed. None where there is no such thing: a complete output alone is none of our business.
    """
    work = unfinished_place(output.resolve() if output.is_symlink() else output)
    if not (output / DATASET_FILE).is_file() or not (work / OURS).is_file():
        return None
    with exclusive_output(output, "preparing data"):
        content = read_json_object(output / DATASET_FILE, DataError)
        splits = content.get("splits")
        for key in _RESULTS:
            content.pop(key, None)
        if content != plan or not isinstance(splits, dict):
            return None
        check_manifest(output, DataError, checksums=True, advice=PREPARE_AGAIN)
        remove_unfinished(work)
    return {name: described(output / DATASET_FILE, name)[1] for name in splits}


def _plan_of(work: Path) -> dict[str, Any] | None:
    if not (work / _PLAN_FILE).is_file():
        return None
    try:
        return read_json_object(work / _PLAN_FILE, DataError)
    except DataError:
        return {}  # damaged: nothing there can be believed


def _run_shards(
    work: Path,
    how: Preparation,
    options: TextOptions,
    tokenizer: Tokenizer,
    tasks: list[Task],
    processes: Processes | None,
    progress: Progress,
) -> None:
    total = sum(task.shard.stop - task.shard.start for task in tasks)
    missing, done, counts = [], 0, np.zeros(2, dtype=np.int64)
    for task in tasks:
        if not task.part(work).is_done():
            missing.append(task)
            continue
        done += task.shard.stop - task.shard.start
        counts += task.part(work).size(SPLITS)
    progress(done, total, _note(counts))
    start = partial(_start, work, how, options, tokenizer)
    if processes is None:
        start()
        finished: Iterator[Task] = (_done(work, task) for task in missing)
    else:
        finished = processes.run(partial(_done, work), missing, start=start, describe=_description)
    for task in finished:
        done += task.shard.stop - task.shard.start
        counts += task.part(work).size(SPLITS)
        progress(done, total, _note(counts))


def _size_in_memory(task: Task) -> float:
    """Bytes of text that a shard may hold at once."""
    is_plain = ending_of(task.shard.path) in PLAIN_ENDINGS and not is_compressed(task.shard.path)
    return task.shard.stop - task.shard.start if is_plain else math.inf


def _note(counts: np.ndarray) -> str:
    documents, tokens = counts.tolist()
    return f"{documents:,} documents, {tokens:,} tokens"


def _description(task: Task) -> str:
    shard = task.shard
    return f"{shard.path}, bytes {shard.start} to {shard.stop}; start the same command again to go on"


_worker: Worker | None = None


def _start(work: Path, how: Preparation, options: TextOptions, tokenizer: Tokenizer) -> None:
    """Give this process the tokenizer that was loaded once: that takes seconds."""
    global _worker
    _worker = how.worker(work, options, tokenizer)


def _done(work: Path, task: Task) -> Task:
    assert _worker is not None
    with _writing(work):
        _worker.do(task)
    return task


def _join(
    work: Path,
    tasks: Sequence[Task],
    plan: dict[str, Any],
    how: Preparation,
    options: TextOptions,
    tokenizer: Tokenizer,
) -> dict[str, SplitSummary]:
    """Join the parts of every split to the finished directory, and describe it."""
    dtype = how.dtype(tokenizer)
    parts = [task.part(work) for task in tasks]
    check_parts(parts)
    output = work / _JOINED
    output.mkdir()
    told = [part.told() for part in parts]
    left_out = _left_out(told)
    if options.deduplicate:
        left_out["copy of another document"] = sum(find_copies(parts, split) for split in SPLITS)
    buckets = _buckets(plan) if options.order == "random" else 0
    files, splits = np.zeros((len(plan["sources"]), 3), dtype=np.int64), {}
    sums: dict[str, FileSum] = {}
    for name in SPLITS:
        counts = np.zeros_like(files)
        total = join_split(parts, name, output, dtype, buckets=buckets, counts=counts)
        if total.bytes:
            sums[f"{name}.bin"] = total
            splits[name] = dict(zip(_COUNTED, counts.sum(axis=0).tolist(), strict=True))
        files += counts
    if not splits:
        raise DataError(_nothing_left(plan, left_out))
    if (made := how.finish(output, splits, tokenizer)) is not splits:
        splits, sums = dict(made), {}  # other files than those that were summed
    results = {
        "splits": splits,
        "files": [
            {"path": source["path"], **dict(zip(_COUNTED, row.tolist(), strict=True))}
            for source, row in zip(plan["sources"], files, strict=True)
        ],
        "left_out": left_out,
        "first_bad_lines": [line for one in told for line in one.bad_lines][:_SAMPLES],
        **_read(told),
    }
    _write_samples(output / DROPPED_FILE, told)
    write_synced(output / DATASET_FILE, (json.dumps({**plan, **results}, indent=2) + "\n").encode())
    write_manifest(output, sums)
    say_left_out(left_out, results["first_bad_lines"])
    return {name: SplitSummary(counts["documents"], counts["tokens"]) for name, counts in splits.items()}


_COUNTED = ("documents", "tokens", "bytes")


def _nothing_left(plan: dict[str, Any], left_out: dict[str, int]) -> str:
    names = [source["path"] for source in plan["sources"]]
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    if not any(source["bytes"] for source in plan["sources"]):
        return f"{names[0]}{more}: empty, without a byte"
    why = ", ".join(f"{count} {reason}" for reason, count in left_out.items() if count) or "no document in it"
    return f"{names[0]}{more}: no text there is left ({why})"


def _buckets(plan: dict[str, Any]) -> int:
    """Stretches of the random order, so that the documents of one fit into memory."""
    size = 0
    for source in plan["sources"]:
        path = Path(source["path"])
        size += source["bytes"] * (_EXPANDS if is_compressed(path) or path.suffix.lower() == ".parquet" else 1)
    return 1 + size // _BUCKET_BYTES


def _left_out(told: Sequence[Told]) -> dict[str, int]:
    result = {"empty": sum(one.empty for one in told), "bad line": sum(one.bad for one in told)}
    for one in told:
        for reason, count in one.dropped.items():
            result[reason] = result.get(reason, 0) + count
    return result


def _read(told: Sequence[Told]) -> dict[str, Any]:
    """What rows of chat data held, if that was counted."""
    read: dict[str, int] = {}
    for one in told:
        for what, count in one.read.items():
            read[what] = read.get(what, 0) + count
    return {"read": read} if read else {}


def _write_samples(path: Path, told: Sequence[Told]) -> None:
    kept: dict[str, int] = {}
    lines = []
    for reason, file, text in (sample for one in told for sample in one.samples):
        kept[reason] = kept.get(reason, 0) + 1
        if kept[reason] <= _SAMPLES:
            lines.append(json.dumps({"reason": reason, "file": file, "text": text}, ensure_ascii=False) + "\n")
    if lines:
        write_synced(path, "".join(lines).encode())
