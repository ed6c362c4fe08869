"""Packed pairs: both answers of a pair in one pack, each with its prompt, its mask and its number."""

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_ext.data.indexed import write_index
from megatron_ext.data.prepare.chat_files import RECORD, pair_record, unpack_split
from megatron_ext.data.prepare.chat_samples import ChatSample
from megatron_ext.data.stream.batches import collate
from megatron_ext.data.stream.packing import packs_of
from megatron_ext.data.stream.pairs import PackedPairs, first_pairs
from megatron_ext.data.stream.plan import Place
from megatron_ext.errors import DataError


def answer(first: int, length: int, counted: int) -> ChatSample:
    return ChatSample(list(range(first, first + length)), [False] * (length - counted) + [True] * counted)


def written(directory: Path, *pairs: tuple[ChatSample, ChatSample]) -> str:
    """Pairs as files, without all that is beside them."""
    records = [pair_record(*pair) for pair in pairs]
    (directory / "train.bin").write_bytes(np.concatenate(records).tobytes())
    write_index(directory / "train.idx", np.array([len(record) for record in records]), RECORD)
    unpack_split(directory, "train", 100, pairs=True)
    return str(directory / "train")


def test_a_pair_is_never_in_two_packs(tmp_path: Path) -> None:
    prefix = written(
        tmp_path,
        (answer(1, 3, 1), answer(11, 4, 2)),
        (answer(21, 5, 2), answer(31, 4, 1)),
        (answer(41, 2, 1), answer(51, 2, 1)),
    )
    packs = packs_of(prefix, 12, 2)
    assert sorted(length for _, length in packs.pieces(0) + packs.pieces(1)) == [4, 7, 9]
    file = PackedPairs(prefix, packs, first=100)
    rows = [file.pack(Place("s", number, number, 0, 12)) for number in range(2)]
    full, other = sorted(rows, key=lambda row: -len(row["pairs"]))
    assert full["pairs"].tolist() == [100, 102]
    assert full["tokens"].tolist() == [1, 2, 3, 11, 12, 13, 14, 41, 42, 51, 52, 1]
    assert full["segments"].tolist() == [0] * 3 + [1] * 4 + [2] * 2 + [3] * 2 + [-1]
    assert full["loss_mask"].tolist() == [0, 1, 0, 0, 1, 1, 0, 1, 0, 1, 0, 0]
    assert full["documents"] == [3, 4, 2, 2, 1]
    assert full["answer_tokens"].tolist() == [[1, 2], [1, 1]]
    assert other["pairs"].tolist() == [101]

    micro = collate([{**row, "seed": 0, "source": 0} for row in (full, other)])
    assert micro.pairs is not None
    assert micro.pairs.is_pair_BP.tolist() == [[True, True], [True, False]]
    sums = micro.pairs.sums(micro.loss_mask * micro.labels)
    assert sums.tolist() == [[[3, 27], [42, 52]], [[49, 34], [0, 0]]]
    halves = [micro.context_share(rank, 2) for rank in range(2)]
    parts = [half.pairs.sums(half.loss_mask * half.labels) for half in halves if half.pairs is not None]
    assert torch.equal(sum(parts), sums)


def test_pairs_of_several_files_have_numbers_of_their_own(tmp_path: Path) -> None:
    assert first_pairs({"a": 3, "b": 4, "c": 1}, ["b", "a", "b", "c"]) == {"b": 0, "a": 4, "c": 7}
    prefix = written(tmp_path, (answer(1, 3, 1), answer(11, 4, 0)))
    with pytest.raises(DataError, match=r"pairs 0 of .*an answer has no token to compare"):
        PackedPairs(prefix, packs_of(prefix, 12, 2), 0).pack(Place("s", 0, 0, 0, 12))
