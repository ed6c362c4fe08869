#!/usr/bin/env python
"""Preparing data: the tokenizer's own speed by the batch, ours, and Megatron-LM's way, in one run, with memory.

    raw    SentencePiece encodes all texts, which are in memory already, in one call with as many threads
    ours   tools/preprocess.py's work, from the text to finished files
    peer   as Megatron-LM's preprocess_data.py: a pool encodes line by line, the main process writes each document

Imports, reading (raw) and loading the tokenizer are the start; processes that begin, and segments of text that no
worker knows yet, count as work.

Text: a corpus that is drawn from the sample corpora (MEGATRON_EXT_SAMPLE_DATA), half Japanese, half English by
documents; their 2.4 MB come again and again, so `--corpus FILE.jsonl` of your own tells more.
"""

import argparse
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import sentencepiece

from megatron_ext.data.prepare.preprocess import preprocess
from megatron_ext.data.tokenizer import Tokenizer, train_tokenizer
from megatron_ext.progress import amount_of_bytes

ROWS = ("raw", "ours", "peer")


def main() -> None:
    """Run every way in a process of its own, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", metavar="FILE", help="a .jsonl file (default: drawn from the sample corpora)")
    parser.add_argument("--megabytes", type=int, default=200, metavar="N", help="of the drawn corpus (default 200)")
    parser.add_argument("--vocab-size", type=int, default=16_000, metavar="N", help="pieces (default 16,000)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="threads and processes (default 2)")
    parser.add_argument("--tiny", action="store_true", help="one MB, to see that it runs")
    parser.add_argument("--job", nargs=2, metavar=("ROW", "FOLDER"), help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.job:
        run_job(*o.job, workers=o.workers)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, o)
        size = (folder / "c.jsonl").stat().st_size
        print(f"{amount_of_bytes(size)} of JSON Lines, {o.workers} workers")
        print(
            f"{'':6}{'MB/s':>8}{'of raw':>8}{'x peer':>8}{'start s':>9}{'CPU s':>8}{'most of a process':>20}",
            flush=True,
        )
        found = {row: measured(row, folder, o.workers) for row in ROWS}
        for row, (start, seconds, cpu, memory) in found.items():
            share, times = (found[other][1] / seconds for other in ("raw", "peer"))
            speeds = f"{row:6}{size / 1e6 / seconds:8.1f}{share:8.0%}{times:8.1f}"
            print(f"{speeds}{start:9.1f}{cpu:8.1f}{amount_of_bytes(memory):>20}")


def prepare(folder: Path, o: argparse.Namespace) -> None:
    """Write the corpus and train its tokenizer."""
    samples = os.environ.get("MEGATRON_EXT_SAMPLE_DATA")
    if o.corpus is None and samples is None:
        raise SystemExit("error: give --corpus FILE, or the sample corpora in MEGATRON_EXT_SAMPLE_DATA")
    if o.corpus is not None:
        (folder / "c.jsonl").symlink_to(Path(o.corpus).resolve())
        files = [folder / "c.jsonl"]
    else:
        files = [
            Path(str(samples), "corpus", f"{name}.jsonl") for name in ("ja_novel", "ja_tldr", "en_novel", "en_tldr")
        ]
        draw_corpus(folder / "c.jsonl", files, 1_000_000 if o.tiny else o.megabytes * 1_000_000)
    train_tokenizer(files, folder / "t", 4000 if o.tiny else o.vocab_size)


def draw_corpus(path: Path, files: list[Path], size: int) -> None:
    """Documents of lines that are shuffled within one to six documents of a language."""
    texts = [[json.loads(line)["text"] for line in file.read_text().splitlines()] for file in files]
    languages, draw, written = (texts[0] + texts[1], texts[2] + texts[3]), random.Random(0), 0
    with open(path, "wb") as out:
        while written < size:
            lines = [
                line for text in draw.choices(draw.choice(languages), k=draw.randint(1, 6)) for line in text.split("\n")
            ]
            draw.shuffle(lines)
            written += out.write(json.dumps({"text": "\n".join(lines)}, ensure_ascii=False).encode() + b"\n")


def measured(row: str, folder: Path, workers: int) -> tuple[float, float, float, int]:
    """Seconds of start and of work, seconds of CPU, and bytes of the largest process of one way."""
    call = [sys.executable, __file__, "--job", row, str(folder), "--workers", str(workers)]
    process = subprocess.Popen(call, stdout=subprocess.PIPE, text=True)
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
    start, seconds = json.loads(process.stdout.read().splitlines()[-1])
    return start, seconds, sum(cpu.values()), memory


def run_job(row: str, name: str, workers: int) -> None:
    """Do one way and print how long its start and its work took."""
    folder, begin = Path(name), time.perf_counter()
    begun = []
    if row == "raw":
        lines = (folder / "c.jsonl").read_bytes().splitlines()
        texts = [json.loads(line)["text"] for line in lines]
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "t" / "tokenizer.model"))
        begun.append(time.perf_counter())
        pieces.encode(texts, num_threads=workers)
    elif row == "ours":
        told = lambda *_: begun.append(time.perf_counter())  # noqa: E731
        preprocess([folder / "c.jsonl"], folder / "t", folder / "ours", workers=workers, progress=told)
    else:
        eod = Tokenizer(folder / "t").eod
        begun.append(time.perf_counter())
        as_the_peer(folder, workers, eod)
    print(json.dumps([begun[0] - begin, time.perf_counter() - begun[0]]))


_pieces: sentencepiece.SentencePieceProcessor | None = None


def as_the_peer(folder: Path, workers: int, eod: int) -> None:
    """Encode and write as Megatron-LM's tools/preprocess_data.py does."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(folder / "peer.bin"), dtype=np.uint16)
    start = partial(start_peer, str(folder / "t" / "tokenizer.model"))
    with multiprocessing.Pool(workers, initializer=start) as pool, open(folder / "c.jsonl", encoding="utf-8") as lines:
        for ids in pool.imap(encode_line, lines, 32):
            builder.add_document(torch.IntTensor([*ids, eod]), [len(ids) + 1])
    builder.finalize(str(folder / "peer.idx"))


def start_peer(model: str) -> None:
    """Open the tokenizer in a process of the pool."""
    global _pieces
    _pieces = sentencepiece.SentencePieceProcessor(model_file=model)


def encode_line(line: str) -> list[int]:
    """Token ids of the text of a line."""
    assert _pieces is not None
    return list(_pieces.encode(json.loads(line)["text"]))


if __name__ == "__main__":
    main()
