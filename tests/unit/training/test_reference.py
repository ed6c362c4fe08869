"""Files of what a reference says of pairs: whole or not there, and of these pairs alone."""

import os
import signal
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch

from megatron_ext.data.prepare.chat import ChatPreparation
from megatron_ext.errors import CheckpointError
from megatron_ext.training import reference

SAID = {"weights": "float32:1", "data": "ab", "data.sequence_length": "64"}


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    path, table = reference.reference_file(tmp_path / "train", "float32:0a"), -torch.rand(5, 2)
    assert path.name == "train.reference-float32-0a.safetensors"
    reference._write(path, table, SAID)
    assert torch.equal(reference._read(path, SAID, 5), table)
    assert list(tmp_path.iterdir()) == [path]


def test_pairs_are_prepared_anew_over_what_a_reference_said_of_them() -> None:
    """With --force, which replaces folders only where it knows all that they hold; an unfinished file, too."""
    name = reference.reference_file("train", "float32:0a").name
    for left in (name, f".{name}.123.partial"):
        assert any(fnmatch(left, pattern) for pattern in ChatPreparation(kind="preference").contents)


@pytest.mark.parametrize("at", ["save", "sync", "writing"])
def test_a_kill_leaves_nothing_that_looks_complete(at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it is on the disk; the next start writes it anew."""
    path, table = reference.reference_file(tmp_path / "train", "float32:0a"), -torch.rand(5, 2)
    if (child := os.fork()) == 0:
        monkeypatch.setattr(reference, at, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        reference._write(path, table, SAID)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert not list(tmp_path.glob("train.reference*"))
    reference._write(path, table, SAID)
    assert torch.equal(reference._read(path, SAID, 5), table)


@pytest.mark.parametrize(
    ("changed", "pairs", "said"),
    [
        ({"data": "cd"}, 5, "data: ab there, cd in this run"),
        ({"data.sequence_length": "128"}, 5, "data.sequence_length: 64 there, 128 in this run"),
        ({"weights": "float32:2"}, 5, "weights: float32:1 there, float32:2 in this run"),
        ({}, 6, "holds no log-probabilities of 6 pairs"),
    ],
    ids=["data", "length", "weights", "pairs"],
)
def test_what_is_of_something_else_is_refused(tmp_path: Path, changed: dict[str, str], pairs: int, said: str) -> None:
    path = tmp_path / "train.reference-x.safetensors"
    reference._write(path, -torch.rand(5, 2), SAID)
    with pytest.raises(CheckpointError, match="move it away") as refused:
        reference._read(path, {**SAID, **changed}, pairs)
    assert said in str(refused.value)


def test_what_is_cut_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "train.reference-x.safetensors"
    reference._write(path, -torch.rand(5, 2), SAID)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"train.reference-x.safetensors: cannot be read .*move it away"):
        reference._read(path, SAID, 5)
