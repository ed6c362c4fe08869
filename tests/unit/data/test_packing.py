"""Packed samples hold every token once, cut what is longer than a sample alone, and leave no loss where nothing is."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.data.indexed import write_index
from megatron_ext.data.stream.packing import best_fit, cut_in_samples, packs_of
from megatron_ext.data.stream.units import PackedFile, PlannedSamples
from megatron_ext.training.planned import size_of_source
from tests.unit.data.plans import planned

EOD = 9_999


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(2, 16))
def test_every_token_is_in_one_pack_and_only_long_documents_are_cut(lengths: list[int], size: int) -> None:
    packs = best_fit(np.array(lengths, dtype=np.int32), size)
    found = []
    for pack in range(len(packs)):
        pieces = packs.pieces(pack)
        assert 0 < sum(length for _, length in pieces) <= size
        found += [token for start, length in pieces for token in range(start, start + length)]
    assert sorted(found) == list(range(sum(lengths)))
    ends = np.cumsum(lengths)
    whole = {(int(end) - length, length) for end, length in zip(ends, lengths, strict=True)}
    kept = whole & {piece for pack in range(len(packs)) for piece in packs.pieces(pack)}
    assert len(kept) == sum(length <= size for length in lengths)
    assert packs.cut == sum(length > size for length in lengths) <= packs.cut_otherwise
    assert packs.padding == pytest.approx(1 - sum(lengths) / (len(packs) * size))


def test_a_document_goes_into_the_fullest_pack_that_has_room() -> None:
    packs = best_fit(np.array([5, 3, 7, 2, 12]), 10)
    # 10 of the last, then 7, 5; 3 fits on 7 exactly; both twos go on 5.
    assert [[length for _, length in packs.pieces(pack)] for pack in range(len(packs))] == [[10], [3, 7], [5, 2, 2]]
    assert packs.saved() == "packed into 3 samples of 10: documents cut 1 instead of 2, filled up 3.333%"


def test_documents_that_are_cut_are_counted() -> None:
    assert cut_in_samples(np.array([4, 4, 6, 2, 9]), 8) == 1
    assert cut_in_samples(np.array([4, 5, 7, 8]), 8) == 1
    assert cut_in_samples(np.array([8, 3, 5]), 8) == 0


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """Documents of 5, 3 and 12 tokens, which count up and end with EOD."""
    lengths = np.array([5, 3, 12])
    tokens = np.arange(20)
    tokens[np.cumsum(lengths) - 1] = EOD
    tokens.astype(np.uint16).tofile(tmp_path / "a.bin")
    write_index(tmp_path / "a.idx", lengths, np.dtype(np.uint16))
    (tmp_path / "dataset.json").write_text("{}")
    return tmp_path / "a"


def test_samples_of_packs(prefix: Path) -> None:
    file = PackedFile(prefix, 20, packs_of(str(prefix), 10), EOD)
    size = size_of_source(str(prefix), 20, 10)
    assert size.tokens == 21
    assert size.fingerprint != size_of_source(str(prefix), 20, None).fingerprint
    plan = planned({"a": 2}, [{"name": "all", "take": {"a": {"epochs": 1}}, "global_batch_size": 1}], length=10)
    samples = PlannedSamples(plan, {"a": file}, vocab_size=10_000)
    read = sorted(
        (s["tokens"].tolist(), s["labels"].tolist(), s["loss_mask"].tolist()) for s in (samples[0], samples[1])
    )
    # Both short documents and the rest of the long one fill a pack; where the long one is cut, it goes on.
    assert read == [
        ([0, 1, 2, 3, EOD, 5, 6, EOD, 18, EOD], [1, 2, 3, EOD, 5, 6, EOD, 18, EOD, EOD], [1.0] * 9 + [0.0]),
        (list(range(8, 18)), list(range(9, 19)), [1.0] * 10),
    ]


def test_what_is_filled_up_has_no_loss(prefix: Path) -> None:
    file = PackedFile(prefix, 20, packs_of(str(prefix), 14), EOD)
    plan = planned({"a": 2}, [{"name": "all", "take": {"a": {"epochs": 1}}, "global_batch_size": 1}], length=14)
    samples = PlannedSamples(plan, {"a": file}, vocab_size=10_000, eod=EOD)
    masks = {tuple(s["tokens"].tolist()): s["loss_mask"].tolist() for s in (samples[0], samples[1])}
    long = (*range(8, 19), EOD, EOD, EOD)
    assert masks[long] == [1.0] * 11 + [0.0] * 3
    assert "8 to 19 of" in " ".join(samples.place(n).where for n in range(2))
