#!/usr/bin/env python
"""Preparing data: the tokenizer's own speed by the batch, ours, and Megatron-LM's way, in one run, with memory.

    raw    SentencePiece, or of a --tokenizer without its model the tokenizers library, encodes all texts, which are in
           memory already, by as many threads
    ours   tools/preprocess.py's work, from the text to finished files; with numba (the extra `fast`), and without
    peer   as Megatron-LM's preprocess_data.py: a pool encodes line by line, the main process writes each document

Imports, reading (raw) and loading the tokenizer are the start. CPU seconds are those of all processes, but for what the
command has taken until then, with a process that loaded the tokenizer: workers that begin meanwhile count as work
there. On a machine that is busy with other things the shares of CPU seconds are the ones to look at.

Text, from the sample corpora (MEGATRON_EXT_SAMPLE_DATA), half Japanese, half English:

    again  documents of their lines, which come again and again, as in a corpus that is large beside its vocabulary
    new    drawn character by character, each by the few before, so that most words are new ones; or --corpus
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import sentencepiece
import tokenizers
from report import hardware, markdown_table, record, versions

from megatron_ext.command import script_runs_once
from megatron_ext.data.indexed import token_dtype
from megatron_ext.data.prepare.preprocess import preprocess
from megatron_ext.data.tokenizer import Tokenizer, train_tokenizer
from megatron_ext.progress import amount_of_bytes

ROWS = ("raw", "ours", "ours, without numba", "peer")
COLUMNS = (
    *("text, workers", "way", "MB/s", "of raw", "x peer"),
    *("start s", "CPU s", "of raw, by CPU s", "x peer, by CPU s", "most of a process"),
)
SAMPLES = (("ja_novel", "ja_tldr"), ("en_novel", "en_tldr"))
_AT_ONCE = 10_000
_CONTEXTS = (3, 4)
"""Characters that the next one is drawn by, in Japanese and in English."""


def main() -> None:
    """Run every way in a process of its own, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", nargs="+", choices=("again", "new"), default=["again", "new"], help="default: both")
    parser.add_argument("--corpus", metavar="FILE", help="a .jsonl file to take for the new text")
    parser.add_argument("--megabytes", type=int, default=100, metavar="N", help="of each drawn text (default 100)")
    parser.add_argument("--vocab-size", type=int, default=16_000, metavar="N", help="pieces (default 16,000)")
    parser.add_argument("--tokenizer", metavar="DIR", help="one that is there (default: a unigram model is trained)")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], metavar="N", help="default: 1 2")
    parser.add_argument("--tiny", action="store_true", help="one MB, to see that it runs")
    parser.add_argument("--record", action="store_true", help="append the table to benchmarks/RESULTS.md")
    parser.add_argument("--job", nargs=2, metavar=("ROW", "FOLDER"), help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.job:
        run_job(*o.job, workers=o.workers[0])
        return
    lines = []
    with tempfile.TemporaryDirectory(prefix="preprocess-") as name:
        for text in o.texts:
            folder = Path(name, text)
            folder.mkdir()
            size = prepare(folder, text, o)
            for workers in o.workers:
                found = {}
                for row in ROWS:
                    found[row] = measured(row, folder, workers)
                    print(text, workers, row, *found[row], file=sys.stderr, flush=True)
                lines += table_rows(f"{text} ({amount_of_bytes(size)}), {workers}", found, size)
    extra = ["numba"] if importlib.util.find_spec("numba") else []
    with_what = f"{o.vocab_size:,} pieces" if o.tokenizer is None else Path(o.tokenizer).name
    said = f"{hardware()}. {versions('sentencepiece', 'tokenizers', 'numpy', *extra)}. {with_what}."
    print(table := f"{said}\n\n{markdown_table(COLUMNS, lines)}")
    if o.record:
        record("Preparing data" + (" (tiny)" if o.tiny else ""), table)


def table_rows(what: str, found: dict[str, tuple[float, float, float, int]], size: int) -> list[list[str]]:
    """Rows of the table of one text and number of workers."""
    rows = []
    for row, (start, seconds, cpu, memory) in found.items():
        share, times = (found[other][1] / seconds for other in ("raw", "peer"))
        cpu_share, cpu_times = (found[other][2] / cpu for other in ("raw", "peer"))
        speeds = [f"{size / 1e6 / seconds:.1f}", f"{share:.0%}", f"{times:.1f}"]
        work = [f"{cpu:.1f}", f"{cpu_share:.0%}", f"{cpu_times:.1f}"]
        rows.append([what, row, *speeds, f"{start:.1f}", *work, amount_of_bytes(memory)])
    return rows


def prepare(folder: Path, text: str, o: argparse.Namespace) -> int:
    """Write the corpus and train its tokenizer; bytes of the corpus."""
    corpus, size = folder / "c.jsonl", 1_000_000 if o.tiny else o.megabytes * 1_000_000
    if text == "new" and o.corpus is not None:
        corpus.symlink_to(Path(o.corpus).resolve())
    elif (samples := os.environ.get("MEGATRON_EXT_SAMPLE_DATA")) is None:
        raise SystemExit("error: set MEGATRON_EXT_SAMPLE_DATA to the sample corpora")
    else:
        files = [[Path(samples, "corpus", f"{name}.jsonl") for name in names] for names in SAMPLES]
        draw: Callable[[Path, list[list[Path]], int], None] = draw_corpus if text == "again" else draw_words
        draw(corpus, files, size)
    (folder / "without").mkdir()
    (folder / "without" / "numba.py").write_text("raise ImportError('left out')\n")
    if o.tokenizer is not None:
        (folder / "t").symlink_to(Path(o.tokenizer).resolve())
    else:
        train_tokenizer([corpus], folder / "t", 4000 if o.tiny else o.vocab_size)
    return corpus.stat().st_size


def draw_corpus(path: Path, files: list[list[Path]], size: int) -> None:
    """Documents of lines that are shuffled within one to six documents of a language."""
    languages, draw, written = [list(texts_of(some)) for some in files], random.Random(0), 0
    with open(path, "wb") as out:
        while written < size:
            lines = [
                line for text in draw.choices(draw.choice(languages), k=draw.randint(1, 6)) for line in text.split("\n")
            ]
            draw.shuffle(lines)
            written += out.write(json.dumps({"text": "\n".join(lines)}, ensure_ascii=False).encode() + b"\n")


def draw_words(path: Path, files: list[list[Path]], size: int) -> None:
    """Documents in turns, of characters that each follow the few before it somewhere in the text of a language."""
    draws = [
        documents_of("\0".join(texts_of(some)), *more) for some, *more in zip(files, _CONTEXTS, (1, 2), strict=True)
    ]
    written, number = [0, 0], 0
    with open(path, "wb") as out:
        while sum(written) < size:
            data = json.dumps({"text": next(draws[number])}, ensure_ascii=False).encode()
            written[number] += out.write(data + b"\n")
            number = int(written[1] < written[0])


def documents_of(text: str, context: int, seed: int) -> Iterator[str]:
    """Documents without end, drawn from `text`, in which a zero ends one."""
    behind: defaultdict[str, list[str]] = defaultdict(list)
    for at in range(len(text) - context):
        behind[text[at : at + context]].append(text[at + context])
    draw = random.Random(seed)
    while True:
        at = draw.randrange(len(text) - context)
        last, drawn = text[at : at + context], []
        while (following := behind.get(last)) and (character := following[int(draw.random() * len(following))]) != "\0":
            drawn.append(character)
            last = last[1:] + character
        if drawn:
            yield "".join(drawn)


def texts_of(files: list[Path]) -> Iterator[str]:
    """The documents of JSON Lines."""
    return (json.loads(line)["text"] for file in files for line in file.read_text().splitlines())


def measured(row: str, folder: Path, workers: int) -> tuple[float, float, float, int]:
    """Seconds of start and of work, seconds of CPU of the work, and bytes of the largest process of one way."""
    call = [sys.executable, __file__, "--job", row, str(folder), "--workers", str(workers)]
    hidden = [str(folder / "without")] if "without" in row else []
    paths = os.pathsep.join([*hidden, *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(call, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": paths})
    cpu: dict[int, float] = {}
    memory = 0
    while process.poll() is None:
        with suppress(psutil.Error):
            ours = psutil.Process(process.pid)
            for one in [ours, *ours.children(recursive=True)]:
                with suppress(psutil.Error):
                    times = one.cpu_times()
                    cpu[one.pid], memory = times.user + times.system, max(memory, one.memory_info().rss)
        time.sleep(0.05)
    if process.returncode != 0:
        raise SystemExit(process.returncode)
    assert process.stdout is not None
    start, seconds, cpu_of_start = json.loads(process.stdout.read().splitlines()[-1])
    return start, seconds, sum(cpu.values()) - cpu_of_start, memory


def run_job(row: str, name: str, workers: int) -> None:
    """Do one way and print how long its start and its work took."""
    folder, begin = Path(name), time.perf_counter()
    begun: list[tuple[float, float]] = []
    note = lambda *_: begun.append((time.perf_counter(), cpu_seconds()))  # noqa: E731
    if row == "raw":
        lines = (folder / "c.jsonl").read_bytes().splitlines()
        texts = [json.loads(line)["text"] for line in lines]
        encode = raw_encoder(folder / "t", workers)
        note()
        for first in range(0, len(texts), _AT_ONCE):
            encode(texts[first : first + _AT_ONCE])
    elif row.startswith("ours"):
        with script_runs_once():
            preprocess([folder / "c.jsonl"], folder / "t", folder / "ours", workers=workers, progress=note, force=True)
    else:
        tokenizer = Tokenizer(folder / "t")
        note()
        as_the_peer(folder, workers, tokenizer.eod, token_dtype(tokenizer.vocab_size).type)
    at, cpu = begun[0]
    print(json.dumps([at - begin, time.perf_counter() - at, cpu]))


def cpu_seconds() -> float:
    """Of this process and those that it has waited for."""
    both = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(used.ru_utime + used.ru_stime for used in both)


def raw_encoder(tokenizer: Path, threads: int) -> Callable[[list[str]], object]:
    """The library's own encoding of many texts."""
    if (tokenizer / "tokenizer.model").is_file():
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer / "tokenizer.model"))
        return partial(pieces.encode, num_threads=threads)
    os.environ |= {"TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": str(threads)}
    library = tokenizers.Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    return partial(library.encode_batch_fast, add_special_tokens=False)


_encode: Callable[[str], list[int]] | None = None


def as_the_peer(folder: Path, workers: int, eod: int, dtype: Any) -> None:
    """Encode and write as Megatron-LM's tools/preprocess_data.py does."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(folder / "peer.bin"), dtype=dtype)
    start = partial(start_peer, folder / "t")
    with multiprocessing.Pool(workers, initializer=start) as pool, open(folder / "c.jsonl", encoding="utf-8") as lines:
        for ids in pool.imap(encode_line, lines, 32):
            builder.add_document(torch.IntTensor([*ids, eod]), [len(ids) + 1])
    builder.finalize(str(folder / "peer.idx"))


def start_peer(tokenizer: Path) -> None:
    """Open the tokenizer in a process of the pool."""
    global _encode
    if (tokenizer / "tokenizer.model").is_file():
        _encode = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer / "tokenizer.model")).encode
        return
    library = tokenizers.Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    _encode = lambda text: list(library.encode(text, add_special_tokens=False).ids)  # noqa: E731


def encode_line(line: str) -> list[int]:
    """Token ids of the text of a line."""
    assert _encode is not None
    return list(_encode(json.loads(line)["text"]))


if __name__ == "__main__":
    main()
