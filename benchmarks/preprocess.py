#!/usr/bin/env python
"""Preparing data: the tokenizer's own speed by the batch, ours, and Megatron-LM's way, in one run, with memory.

    raw    SentencePiece encodes all texts, which are in memory already, in one call with as many threads
    ours   tools/preprocess.py's work, from the text to finished files
    peer   as Megatron-LM's preprocess_data.py: a pool encodes line by line, the main process writes each document

Text: a corpus that is drawn from the sample corpora (MEGATRON_EXT_SAMPLE_DATA), half Japanese, half English by documents,
in lines of which none comes twice in a document; or `--corpus FILE.jsonl` of your own, which tells more.
"""

import argparse
import json
import multiprocessing
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import sentencepiece

from megatron_ext.data.prepare.preprocess import preprocess
from megatron_ext.data.tokenizer import Tokenizer, train_tokenizer
from megatron_ext.progress import amount_of_bytes

ROWS = ("raw", "ours", "peer")


def main() -> None:
    """Run every way in a process of its own, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", metavar="FILE", help="a .jsonl file (default: drawn from the sample corpora)")
    parser.add_argument(
        "--megabytes", type=int, default=200, metavar="N", help="size of the drawn corpus (default 200)"
    )
    parser.add_argument("--vocab-size", type=int, default=16_000, metavar="N", help="of the tokenizer (default 16,000)")
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
        print(f"{'':6}{'MB/s':>8}{'of raw':>8}{'x peer':>8}{'CPU s':>8}{'memory, most of a process':>28}")
        found = {row: measured(row, folder, o.workers) for row in ROWS}
        for row, (seconds, cpu, memory) in found.items():
            speed = size / 1e6 / seconds
            share, times = (found[other][0] / seconds for other in ("raw", "peer"))
            print(f"{row:6}{speed:8.1f}{share:8.0%}{times:8.1f}{cpu:8.1f}{amount_of_bytes(memory):>28}")


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
    train_tokenizer(files, folder / "t", 2000 if o.tiny else o.vocab_size)


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


def measured(row: str, folder: Path, workers: int) -> tuple[float, float, int]:
    """Seconds, seconds of CPU and bytes of the largest process of one way."""
    call = [sys.executable, __file__, "--job", row, str(folder), "--workers", str(workers)]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    seconds, cpu, memory = json.loads(done.stdout.splitlines()[-1])
    return seconds, cpu, memory


def run_job(row: str, name: str, workers: int) -> None:
    """Do one way and print its figures."""
    folder = Path(name)
    texts = [json.loads(line)["text"] for line in open(folder / "c.jsonl", "rb")] if row == "raw" else []
    begin = time.perf_counter()
    if row == "raw":
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "t" / "tokenizer.model"))
        pieces.encode(texts, num_threads=workers)
    elif row == "ours":
        preprocess([folder / "c.jsonl"], folder / "t", folder / "ours", workers=workers)
    else:
        as_the_peer(folder, workers)
    seconds = time.perf_counter() - begin
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(one.ru_utime + one.ru_stime for one in used)
    print(json.dumps([seconds, cpu, max(one.ru_maxrss for one in used) * 1024]))


_pieces: sentencepiece.SentencePieceProcessor | None = None


def as_the_peer(folder: Path, workers: int) -> None:
    """Encode and write as Megatron-LM's tools/preprocess_data.py does."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    eod, dtype = Tokenizer(folder / "t").eod, np.uint16
    builder = IndexedDatasetBuilder(str(folder / "peer.bin"), dtype=dtype)
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
