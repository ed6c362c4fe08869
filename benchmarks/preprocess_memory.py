#!/usr/bin/env python
"""The most memory that a process of tools/preprocess.py takes, by kind of tokenizer and number of workers.

The text: documents of 16 MiB, the largest that are taken, without a line end (Japanese, the same with a space every
500,000 characters, English, and one letter), and a line of 1 GB. That is left out and counted, as is a document that a
tokenizer sees as one word.

Kinds: SentencePiece unigram and BPE as tools/tokenizer.py trains them, both read by segments; Llama 3's (bytes, merged
within the words of a regular expression) and T5's (unigram within words, Unicode normalized), read by the tokenizers
library. Every 50 ms each process is asked for its high-water mark (VmHWM of Linux), shared pages included.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import sentencepiece
import tokenizers
from report import hardware, markdown_table, record, versions
from tokenizers import models, normalizers, pre_tokenizers, trainers

from megatron_ext.data.prepare.documents import LONGEST_DOCUMENT, read_documents
from megatron_ext.data.tokenizer import Training, train_tokenizer
from megatron_ext.data.tokenizer.model_file import read_model_file
from megatron_ext.progress import amount_of_bytes

COLUMNS = ("tokenizer", "workers", "command", "most of a worker", "left out", "s")
TOOL = Path(__file__).parent.parent / "tools" / "preprocess.py"
_LONG_WORD = 500_000
"""Characters of a word that the tokenizers library is given just so."""
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def main() -> None:
    """Run every kind, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000, metavar="N", help="of the longest line (default 1000)")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS), help="default: all")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2], metavar="N", help="default: 1 2")
    parser.add_argument("--tiny", action="store_true", help="short lines, to see that it runs")
    parser.add_argument("--record", action="store_true", help="append the table to benchmarks/RESULTS.md")
    o = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="preprocess-memory-") as name:
        folder = Path(name)
        samples = sample_files()
        write_text(folder / "text", samples, o.megabytes * 1_000_000 if not o.tiny else 20_000_000, is_tiny=o.tiny)
        for kind in o.kinds:
            KINDS[kind](samples, folder / "t" / kind, 4000 if o.tiny else 16_000)
            for workers in o.workers:
                rows.append([kind, str(workers), *measured(folder, folder / "t" / kind, workers)])
                print(*rows[-1], sep="\t", file=sys.stderr, flush=True)
    text = f"{hardware()}. {versions('tokenizers', 'sentencepiece', 'numpy')}.\n\n{markdown_table(COLUMNS, rows)}"
    print(text)
    if o.record:
        record("Memory of preparing data" + (" (tiny)" if o.tiny else ""), text)


def sample_files() -> list[Path]:
    """Of the sample corpora: Japanese and English."""
    if (samples := os.environ.get("MEGATRON_EXT_SAMPLE_DATA")) is None:
        raise SystemExit("error: set MEGATRON_EXT_SAMPLE_DATA to the sample corpora")
    return [Path(samples, "corpus", f"{name}.jsonl") for name in ("ja_novel", "ja_tldr", "en_novel", "en_tldr")]


def write_text(folder: Path, samples: list[Path], longest: int, *, is_tiny: bool) -> None:
    """Write the files of text: documents as large as they may be, and behind the longest line one more."""
    folder.mkdir()
    size = (1 << 21 if is_tiny else LONGEST_DOCUMENT) - 64
    japanese, english = (" ".join(read_documents(files)).replace("\n", " ") for files in (samples[:2], samples[2:]))
    unspaced = "".join(japanese.split()) * (1 + size // len(japanese.encode()))
    words = " ".join(unspaced[at : at + _LONG_WORD] for at in range(0, len(unspaced), _LONG_WORD))
    lines = [line_of(text, size) for text in (unspaced, words, english, "x")]
    (folder / "documents.jsonl").write_bytes(b"".join(lines))
    with open(folder / "longest.jsonl", "wb") as file:
        file.write(b'{"text": "')
        for _ in range(longest // 1_000_000):
            file.write(b"word " * 200_000)
        file.write(b'"}\n' + lines[0])


def line_of(text: str, size: int) -> bytes:
    """A line of JSON with `text` again and again, of about `size` bytes."""
    data = text.replace('"', "'").replace("\\", "/").encode()
    whole = (data * (size // len(data) + 1))[:size].decode(errors="ignore")
    return json.dumps({"text": whole}, ensure_ascii=False).encode() + b"\n"


def measured(folder: Path, tokenizer: Path, workers: int) -> list[str]:
    """The most memory of the command and of a worker, what was left out, and seconds."""
    output = folder / "output"
    options = ["--tokenizer", tokenizer, "--output", output, "--workers", workers, "--bad-lines", "skip", "--force"]
    begin = time.perf_counter()
    call = [sys.executable, *map(str, (TOOL, folder / "text", *options))]
    process = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    most: dict[int, int] = {}
    while process.poll() is None:
        with suppress(psutil.Error):
            ours = psutil.Process(process.pid)
            for one in [ours, *ours.children(recursive=True)]:
                most[one.pid] = max(most.get(one.pid, 0), high_water(one.pid))
        time.sleep(0.05)
    seconds = time.perf_counter() - begin
    if process.returncode != 0:
        assert process.stderr is not None
        raise SystemExit(process.stderr.read().decode())
    command, worker = most.pop(process.pid), max(most.values(), default=0)
    bad = json.loads((output / "dataset.json").read_text())["left_out"]["bad line"]
    return [amount_of_bytes(command), amount_of_bytes(worker), str(bad), f"{seconds:.0f}"]


def high_water(pid: int) -> int:
    """Bytes of memory that the process has had at most; 0 of one that has ended."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return 0


def of_sentencepiece(samples: list[Path], folder: Path, size: int, how: Training) -> None:
    """As tools/tokenizer.py trains one."""
    train_tokenizer(samples, folder, size, how)


def of_bytes(samples: list[Path], folder: Path, size: int) -> None:
    """As Llama 3's, and GPT-2's and Qwen's but for the expression."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    words = pre_tokenizers.Split(tokenizers.Regex(LLAMA3), "isolated")
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, last])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(read_documents(samples), trainer)
    write(tokenizer, folder)


def of_words(samples: list[Path], folder: Path, size: int) -> None:
    """As T5's."""
    model = io.BytesIO()
    lines = (line for text in read_documents(samples) for line in text.split("\n") if line.strip())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=model,
        vocab_size=size,
        normalization_rule_name="nmt_nfkc",
        minloglevel=2,
    )
    read = read_model_file(model.getvalue(), "t5")
    tokenizer = tokenizers.Tokenizer(
        models.Unigram([("<|end|>", 0.0), *((piece.text, piece.score) for piece in read.pieces)], unk_id=1)
    )
    characters = normalizers.Precompiled(read.proto.normalizer_spec.precompiled_charsmap)
    tokenizer.normalizer = normalizers.Sequence([characters, normalizers.Replace(tokenizers.Regex(" {2,}"), "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    write(tokenizer, folder)


def write(tokenizer: tokenizers.Tokenizer, folder: Path) -> None:
    """Write a folder as models of Hugging Face have it."""
    folder.mkdir(parents=True)
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


KINDS: dict[str, Callable[[list[Path], Path, int], None]] = {
    "SentencePiece-unigram": partial(of_sentencepiece, how=Training()),
    "SentencePiece-BPE": partial(of_sentencepiece, how=Training(model_type="bpe")),
    "Llama-3": of_bytes,
    "T5": of_words,
}

if __name__ == "__main__":
    main()
