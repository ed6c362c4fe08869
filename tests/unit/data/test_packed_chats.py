"""Packs of conversations: labels within samples, weights, fill, and an order over epochs that is resumed exactly."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_ext.config import DataConfig, DataSource, PretrainTask, SftTask, TrainConfig, load_config
from megatron_ext.data.indexed import write_index
from megatron_ext.data.prepare.chat import ChatPreparation
from megatron_ext.data.prepare.chat_files import RECORD, chat_record, unpack_split
from megatron_ext.data.prepare.chat_samples import ChatSample
from megatron_ext.data.prepare.preprocess import preprocess
from megatron_ext.data.stream.batches import collate
from megatron_ext.data.stream.chat import PackedChats, chat_samples, chat_size, chat_validation
from megatron_ext.data.stream.make_plan import SourceSize, make_plan
from megatron_ext.data.stream.packing import best_fit, packs_of
from megatron_ext.data.stream.plan import Place, RunPlan
from megatron_ext.data.stream.position import Position
from megatron_ext.data.stream.stream import BlendStream, PlannedShapes
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.errors import DataError
from megatron_ext.training.data_files import DataFiles
from tests.unit.data.chats import chat_tokenizer, turns

LENGTH = 64


def written(directory: Path, samples: list[ChatSample]) -> str:
    """Samples as files, without all that is beside them."""
    records = [chat_record(sample) for sample in samples]
    (directory / "train.bin").write_bytes(np.concatenate(records).tobytes())
    write_index(directory / "train.idx", np.array([len(record) for record in records]), RECORD)
    unpack_split(directory, "train", 100, pairs=False)
    return str(directory / "train")


def counted(ids: list[int], first: int, weight: float = 1.0) -> ChatSample:
    """A sample whose tokens count from number `first` on."""
    return ChatSample(ids, [number >= first for number in range(len(ids))], weight)


def test_best_fit_by_the_vector() -> None:
    lengths = np.array([7, 5, 4, 4, 3, 2, 2, 1, 6, 3])
    packs = best_fit(lengths, 10)
    starts = np.cumsum(lengths) - lengths
    found = {frozenset(int(np.flatnonzero(starts == start)[0]) for start, _ in packs.pieces(n)) for n in range(4)}
    assert len(packs) == 4
    assert sorted(10 - sum(length for _, length in packs.pieces(n)) for n in range(4)) == [0, 0, 0, 3]
    assert sorted(map(len, found)) == [2, 2, 3, 3]


@pytest.mark.parametrize(
    ("weighting", "weights"),
    [
        ("token", [1, 1, 1, 0, 0, 1, 0, 1, 0, 0, 0, 0]),
        ("sample", [1 / 3, 1 / 3, 1 / 3, 0, 0, 1, 0, 1, 0, 0, 0, 0]),
        ("row", [0.5, 0.5, 0.5, 0, 0, 2, 0, 1, 0, 0, 0, 0]),
    ],
)
def test_labels_and_weights_by_the_vector(tmp_path: Path, weighting: Any, weights: list[float]) -> None:
    samples = [counted([11, 12, 13, 2], 1, 0.5), counted([21, 22, 2], 2, 2.0), counted([31, 32], 1)]
    prefix = written(tmp_path, samples)
    pack = PackedChats(prefix, packs_of(prefix, 12), weighting).pack(Place("s", 0, 0, 0, 12))
    assert pack["tokens"].tolist() == [11, 12, 13, 2, 21, 22, 2, 31, 32, 11, 12, 13]
    assert pack["documents"] == [4, 3, 2, 3]
    assert pack["loss_mask"].tolist() == pytest.approx(weights)
    labels = [12, 13, 2, None, 22, 2, None, 32, None, None, None, None]
    assert [label for label in pack["labels"].tolist() if label] == [label for label in labels if label]
    assert all(not weight for weight, label in zip(pack["loss_mask"], labels, strict=True) if label is None)
    columns = {name: torch.from_numpy(pack[name]) for name in ("tokens", "labels", "loss_mask")}
    micro = collate([{**columns, "documents": pack["documents"], "seed": 1, "source": 0}] * 2)
    assert micro.position_ids[1].tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1, 0, 1, 2]
    assert micro.document_lengths is not None
    assert micro.document_lengths.tolist() == [[4, 3, 2, 3]] * 2


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("chats")
    chat_tokenizer(directory / "t")
    with open(directory / "c.jsonl", "w") as file:
        for number in range(150):
            messages = turns(f"q{number}", "word " * (number % 7))
            file.write(json.dumps({"messages": messages if number % 7 else turns("q", f"a{number}")}) + "\n")
    how = ChatPreparation(max_tokens=LENGTH)
    preprocess([directory / "c.jsonl"], directory / "t", directory / "d", how=how, split=(0.9, 0.1, 0))
    return directory


def plan_of(chats: Path, epochs: float) -> RunPlan:
    stage = {"name": "s", "take": {"c": {"epochs": epochs}}}
    raw = {"sources": {"c": {"path": str(chats / "d/train")}}, "stages": [stage]}
    data = load_config(DataConfig, {**raw, "sequence_length": LENGTH, "tokenizer": "t"}, source="test")
    size = SourceSize(len(packs_of(str(chats / "d/train"), LENGTH)) * LENGTH + 1, "mark")
    return make_plan(data, TrainConfig(global_batch_size=4, micro_batch_size=2), {"c": size})


def stream_of(chats: Path, plan: RunPlan, rank: int = 0, ranks: int = 1) -> BlendStream:
    tokenizer = Tokenizer(chats / "d" / "tokenizer")
    samples = chat_samples(plan, {"c": str(chats / "d" / "train")}, tokenizer, "token")
    return BlendStream(samples, PlannedShapes(plan, rank, ranks), seed=1, device=torch.device("cpu"))


def test_every_epoch_has_every_pack_in_another_order_and_is_resumed_anywhere(chats: Path) -> None:
    plan = plan_of(chats, 2)
    packs = len(packs_of(str(chats / "d" / "train"), LENGTH))
    assert plan.total_steps == -(-2 * packs // 4)
    stream = stream_of(chats, plan)
    steps = [[row for micro in stream.next() for row in micro.tokens.tolist()] for _ in range(plan.total_steps)]
    rows = [tuple(row) for step in steps for row in step]
    epochs = rows[:packs], rows[packs : 2 * packs]
    assert Counter(epochs[0]) == Counter(epochs[1])
    assert max(Counter(epochs[0]).values()) == 1
    assert epochs[0] != epochs[1]
    assert list(epochs[0]) != sorted(epochs[0])
    at = stream_of(chats, plan)
    for step in (1, plan.total_steps - 1):
        at.seek(Position(4 * step))
        assert [row for micro in at.next() for row in micro.tokens.tolist()] == steps[step]
    halves = [stream_of(chats, plan, rank, 2).next() for rank in range(2)]
    assert [row for half in halves for micro in half for row in micro.tokens.tolist()] == steps[0]
    assert "samples " in stream.place(0).where


def test_nothing_trained_on_is_lost_in_packing(chats: Path) -> None:
    plan = plan_of(chats, 1)
    size = chat_size(str(chats / "d/train"), Tokenizer(chats / "d/tokenizer"), LENGTH)
    packs = packs_of(str(chats / "d/train"), LENGTH)
    files = PackedChats(chats / "d/train", packs, "token")
    masks = [files.pack(Place("c", 0, unit, 0, LENGTH))["loss_mask"].sum() for unit in range(len(packs))]
    assert sum(masks) == size.supervised
    assert packs.padding < 0.1
    assert f"{size.samples:,} samples packed into {len(packs):,} of 64 tokens, filled to 9" in packs.filled()
    assert plan.total_samples >= len(packs)


def test_validation_reads_the_same_packs_for_every_run(chats: Path) -> None:
    data = DataConfig(sequence_length=LENGTH, tokenizer="t", validation=[DataSource(path=str(chats / "d/validation"))])
    tokenizer = Tokenizer(chats / "d" / "tokenizer")
    first, second = (chat_validation(data.validation, data, tokenizer, "token", 6) for _ in range(2))
    assert all(first[n]["tokens"].equal(second[n]["tokens"]) for n in range(6))


def test_a_task_reads_data_of_its_kind(chats: Path) -> None:
    tokenizer = Tokenizer(chats / "d" / "tokenizer")

    def looked_at(task: SftTask | PretrainTask | None) -> tuple[DataFiles, dict[str, SourceSize] | None, list[str]]:
        faults: list[str] = []
        source = DataSource(path=str(chats / "d" / "train"))
        values = {"task": task, "data.train": [source], "data.sequence_length": LENGTH}
        files = DataFiles(values, tokenizer, faults)
        return files, files.look(), faults

    files, sizes, faults = looked_at(SftTask(kind="sft"))
    assert sizes
    assert not faults
    assert "samples packed into" in files.packed[0]
    _, sizes, faults = looked_at(None)  # a task that is wrong itself: how much of the data there is, is not known
    assert sizes is None
    assert not faults
    _, _, (fault,) = looked_at(PretrainTask(kind="pretrain"))
    assert "task.kind = pretrain reads data of tools/preprocess.py, and this is of tools/preprocess.py --chat" in fault


def test_what_cannot_be_read_is_said(chats: Path, tmp_path: Path) -> None:
    path, beside = str(chats / "d/train"), Tokenizer(chats / "d" / "tokenizer")
    with pytest.raises(
        DataError, match="longest sample has .* more than data.sequence_length = 20; .* --max-tokens 20"
    ):
        chat_size(path, beside, 20, "data.train.0.path")
    with pytest.raises(DataError, match=r"answers end with '<\|im_end\|>', where generation .* would not stop: give"):
        chat_size(path, Tokenizer(chats / "t"), LENGTH)
    other = chat_tokenizer(tmp_path / "t", "{{ messages }}")
    with pytest.raises(
        DataError,
        match="has another chat template; give data.tokenizer = .*, which has the one that the data was made with",
    ):
        chat_size(path, Tokenizer(other), LENGTH)
