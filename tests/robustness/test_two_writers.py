"""No tool writes what another process is writing: the second is refused, and the first one's work stays whole."""

import os
import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_ext.checkpoint.hf_directory import HuggingFaceSink
from megatron_ext.checkpoint.streams import MegatronSink, TensorSpec
from megatron_ext.data.prepare.preprocess import preprocess
from megatron_ext.data.tokenizer import train_tokenizer
from megatron_ext.errors import MegatronExtError
from megatron_ext.files import publish_directory
from megatron_ext.testing.pool import GlooPool
from tests.robustness.runs import lock_own_disk, start_otherwise
from tests.support.lock_holder import holder

SPECS = {"embedding.word_embeddings.weight": TensorSpec((4, 2), torch.float32)}


def write(sink: MegatronSink | HuggingFaceSink) -> None:
    with sink:
        pass


WRITERS: dict[str, tuple[str, Callable[[Path, Path], object]]] = {
    "preprocess": (
        "exclusive_output",
        lambda work, target: preprocess([work / "corpus.jsonl"], work / "tokenizer", target),
    ),
    "tokenizer": ("exclusive_output", lambda work, target: train_tokenizer([work / "corpus.jsonl"], target, 330)),
    "to Hugging Face": ("exclusive_output", lambda work, target: write(HuggingFaceSink(target, SPECS))),
    "to Megatron": ("exclusive", lambda work, target: write(MegatronSink(target, SPECS, {}))),
}


@pytest.mark.parametrize("name", WRITERS)
def test_the_second_writer_is_refused_and_touches_nothing(name: str, work: Path, tmp_path: Path) -> None:
    lock, write_to = WRITERS[name]
    target = tmp_path / "output"
    with holder(target, lock) as first:
        # What the first has done so far stands where the second would write.
        place = target / "iter_0000000.partial" if lock == "exclusive" else tmp_path / "output.partial"
        place.mkdir()
        (place / "part").write_text("the first one's")
        with pytest.raises(MegatronExtError, match=rf"is being written by testing on .*\(process {first.pid}, "):
            write_to(work, target)
        assert (place / "part").read_text() == "the first one's"


def test_what_came_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    for name in ("mine", "theirs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    with pytest.raises(FileExistsError, match="somebody else made it meanwhile"):
        publish_directory(tmp_path / "mine", tmp_path / "theirs", replace=False)
    assert os.listdir(tmp_path / "theirs") == ["theirs"]


def test_a_directory_that_each_node_has_for_itself_is_refused_before_anything_is_trained(
    tmp_path: Path, pool: GlooPool
) -> None:
    said = pool.run(3, lock_own_disk, tmp_path)
    assert len(set(said)) == 1  # on every rank alike
    here = re.escape(socket.gethostname())
    assert re.search(rf"what rank 0 on {here} writes there is not seen on {here} \(ranks 1 to 2\)", said[0])
    assert "put it on a file system that every node sees" in said[0]
    assert list(tmp_path.glob("*/*")) == []


def test_ranks_that_were_started_otherwise_are_refused_with_the_keys(tmp_path: Path, pool: GlooPool) -> None:
    told = pool.run(3, start_otherwise, tmp_path)
    assert told[0] == told[1] == told[2]  # on every rank alike
    code, run, data, missing = told[0]
    assert re.search(r"rank 2 on .*, unlike rank 0 on .*: torch = '2\.10\.0' \('2\.13\.0' there\)\n", code)
    assert re.search(r"rank 2 on .*, unlike rank 0 on .*: optimizer\.lr = 0\.5 \(0\.001 there\)\n", run)
    assert "source 1 = 'other' ('b' there)" in data
    assert re.fullmatch(rf"rank 2 on .*: {tmp_path}/c: No such file or directory", missing)
