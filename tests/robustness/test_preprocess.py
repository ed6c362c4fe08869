"""Data preparation under attack: mutated text, killed processes, two at once, a full disk; one message each."""

import gzip
import json
import os
import random
import resource
import shutil
import string
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from megatron_ext.data.dataset import check_dataset
from megatron_ext.data.prepare.preprocess import preprocess
from megatron_ext.data.tokenizer import Tokenizer, train_tokenizer
from megatron_ext.errors import DataError, MegatronExtError
from tests.support.commands import TOOLS
from tests.support.waiting import Holds, ended_at_last, wait_for_ends, wait_until
from tests.support.workspace import write_corpus

SEED, INPUTS = 12, 120


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    train_tokenizer([write_corpus(directory / "c.jsonl")], directory / "t", 330)
    (directory / "large.jsonl").write_bytes((directory / "c.jsonl").read_bytes() * 90)  # a dozen shards, seconds
    return directory


JAPANESE = "日本語の文書"
ROWS = [
    {"text": "one document\nof two lines", "id": 1, "meta": {"tags": ["a", {"b": None}], "score": 0.5}},
    {"text": JAPANESE, "id": 2},
    {"text": "emoji 👩‍💻 and \u0000 nothing", "id": 3},
    {"text": "</s> spelt out <0x0A>", "id": 4},
]
FORMS = {
    "c.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode(),
    "c.json": json.dumps(ROWS, indent=1).encode(),
    "c.txt": JAPANESE.encode() * 9,
}
INSERTED = (b"\\ud800", b"\xef\xbb\xbf", b"\r", b"\xe3\x81", b'"', b"\\", b"{", b"\0" * 9, b"\xff\xfe\x80\x00\xc3")
REPLACED = {
    b'"id": 2': [b'"id": ' + x for x in (b"1" * 5000, b"-1e999", b"NaN", b"[" * 50, b"[" * 99_000, b'{"a":' * 99_000)],
    b'"text"': [b'"txt"', b'"text": null, "x"', b'"\\ud800"', b"text", b"1"],
    b'"one document': [b'5, "x": "', b'["a"], "x": "', b'{}, "x": "'],
    b"\n": [b"\r\n", b"\r", b"\n\n \n", b"\xe2\x80\xa8"],
}
WHOLE = (b"", b" ", b"\n" * 50, b"\0" * 50, b"\xef\xbb\xbf", b"[]", b"{}", b"[[]]", b"null", b'""', b"[", b"1")


def mutated(data: bytes, draw: random.Random) -> bytes:
    """`data` with a fault or two of the kinds that corpora have."""
    for _ in range(draw.randint(1, 2)):
        kind, at = draw.randrange(7), draw.randrange(len(data) + 1)
        if kind == 0:
            data = draw.choice([data[:at], data[at:]])
        elif kind == 1:
            data = bytes(draw.randrange(256) if draw.random() < 0.02 else byte for byte in data)
        elif kind in (2, 3):
            data = data[:at] + draw.choice(INSERTED) + data[at:]
        elif kind in (4, 5):
            old = draw.choice(list(REPLACED))
            data = data.replace(old, draw.choice(REPLACED[old]), draw.choice([1, -1]))
        elif draw.random() < 0.5:
            data = draw.choice(WHOLE)
        else:
            encoding = draw.choice(["utf-16", "utf-16-le", "utf-32", "cp932"])
            data = data.decode("utf-8", "replace").encode(encoding, "replace")
    return data


def corpora() -> Iterator[tuple[str, bytes]]:
    draw = random.Random(SEED)
    for _ in range(INPUTS):
        name = draw.choice(list(FORMS))
        data = mutated(FORMS[name], draw)
        if draw.random() < 0.3:
            name, data = f"{name}.gz", gzip.compress(data)
            data = mutated(data, draw) if draw.random() < 0.5 else data
        yield name, data


def fault_of_preparing(corpus: Path, tokenizer: Path, output: Path) -> str:
    try:
        preprocess([corpus], tokenizer, output, split=(1, 0, 0))
    except MegatronExtError as error:
        return str(error)
    return ""


def test_mutated_text_is_read_or_refused(place: Path, tmp_path: Path) -> None:
    tokenizer, read = Tokenizer(place / "t"), 0
    for number, (name, data) in enumerate(corpora()):
        corpus, output = tmp_path / f"{number}-{name}", tmp_path / f"d{number}"
        corpus.write_bytes(data)
        if fault := fault_of_preparing(corpus, tokenizer.directory, output):
            assert fault.startswith(str(corpus))
            assert len(fault) < 600
            assert not output.exists()
        else:
            check_dataset(output / "train", tokenizer)
            read += 1
    assert INPUTS / 10 < read < INPUTS * 9 / 10, "mutations too weak or too strong to say anything"


def arguments(place: Path, output: Path) -> list[str]:
    options = ["--tokenizer", place / "t", "--output", output, "--workers", 2]
    return [sys.executable, *map(str, (TOOLS / "preprocess.py", place / "large.jsonl", *options))]


@contextmanager
def preparing(place: Path, output: Path) -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """A preparation that is at work, and all processes it has started. Its two workers wait at their later parts."""
    holds = Holds(output.with_name("holds"), *(f"part-000000-{number:06d}-train.bin" for number in (7, 8)))
    usual = {**os.environ, **holds.environment}
    errors = {"stderr": subprocess.PIPE, "stdout": subprocess.DEVNULL, "text": True}
    process: subprocess.Popen[str] = subprocess.Popen(arguments(place, output), env=usual, **errors)
    parts = output.with_name(f"{output.name}.partial")
    with ended_at_last(process):
        wait_until(lambda: len(list(parts.glob("part-*.bin"))) >= 6, lambda: sorted(parts.glob("*")), process)
        yield process, psutil.Process(process.pid).children(recursive=True)
    shutil.rmtree(holds.folder)


def test_two_at_once_and_sigterm(place: Path, tmp_path: Path) -> None:
    with preparing(place, tmp_path / "d") as (process, others):
        refusal = fault_of_preparing(place / "large.jsonl", place / "t", tmp_path / "d")
        assert refusal.startswith(f"{tmp_path}/d is being written by preparing data on")
        assert f"process {process.pid}" in refusal
        assert process.poll() is None, "the first one has suffered"
        process.terminate()
        assert "terminated\n" in process.communicate()[1]
        assert process.returncode == 143
        wait_for_ends(others)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.partial"]


def test_sigterm_to_the_training_of_a_tokenizer(tmp_path: Path) -> None:
    """SentencePiece hears no signals, and trains on so many different words for a minute of two processors."""
    draw = random.Random(SEED)
    words = ("".join(draw.choices(string.ascii_lowercase, k=draw.randint(2, 9))) for _ in range(1_200_000))
    (tmp_path / "words.txt").write_text("".join(word + " \n"[n % 60 == 59] for n, word in enumerate(words)))
    options = ("train", tmp_path / "words.txt", "--output", tmp_path / "t", "--vocab-size", 600)
    call = [sys.executable, *map(str, (TOOLS / "tokenizer.py", *options))]
    process = subprocess.Popen(call, stderr=subprocess.PIPE, text=True)
    with ended_at_last(process):
        seconds = lambda: psutil.Process(process.pid).cpu_times().user  # noqa: E731
        wait_until(lambda: seconds() > 6, seconds, process)  # before it trains it takes two
        process.terminate()
        assert process.communicate()[1] == "terminated\n"
        assert process.returncode == 143
    assert [path.name for path in tmp_path.iterdir()] == ["words.txt"]


def test_killed_processes(place: Path, tmp_path: Path) -> None:
    with preparing(place, tmp_path / "d") as (process, others):
        worker = next(other for other in others if other.ppid() != process.pid)
        worker.kill()
        stderr = process.communicate()[1]
        assert process.returncode == 2
        assert f"worker process {worker.pid} was killed by SIGKILL, most likely because memory ran out" in stderr
        assert "large.jsonl, bytes " in stderr
        assert "Traceback" not in stderr
        wait_for_ends(others)
    with preparing(place, tmp_path / "d") as (process, others):
        process.kill()
        wait_for_ends(others)
    assert not (tmp_path / "d").exists()


def test_a_full_disk_is_one_message_and_the_rest_is_kept(place: Path, tmp_path: Path) -> None:
    """A limit on the size of files fails as a full disk does: in the middle of a write."""
    options = ("--tokenizer", place / "t", "--output", tmp_path / "d")
    call = [sys.executable, *map(str, (TOOLS / "preprocess.py", place / "c.jsonl", *options))]
    process = subprocess.run(
        call,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )
    assert process.returncode == 2, process.stderr
    assert "cannot be written (File too large); what is done is kept in" in process.stderr
    assert "Traceback" not in process.stderr
    preprocess([place / "c.jsonl"], place / "t", tmp_path / "d")
    preprocess([place / "c.jsonl"], place / "t", tmp_path / "whole")
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "d" / path.name).read_bytes() == path.read_bytes()


def test_workers_pass_on_what_went_wrong(place: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\n{"text": 5}\n')
    with pytest.raises(DataError, match=r"b\.jsonl:2: no text under 'text': it is a number"):
        preprocess([tmp_path], place / "t", tmp_path.with_name("workers"), workers=2)
