"""What a stream reads of real files is what the plan says: over ranks, micro-batches, workers, kills and lengths."""

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_ext.config import DataConfig, DataSource
from megatron_ext.data.prepare.preprocess import preprocess
from megatron_ext.data.stream.plan import RunPlan
from megatron_ext.data.stream.position import Position
from megatron_ext.data.stream.sources import build_blend
from megatron_ext.data.stream.stream import BlendStream, PlannedShapes
from megatron_ext.data.stream.units import PlannedSamples, TokenFile
from megatron_ext.data.tokenizer import Tokenizer, train_tokenizer
from megatron_ext.errors import DataError
from tests.support.workspace import write_corpus
from tests.unit.data.plans import planned, stored

SAMPLES = {"a": 30, "b": 7}
FIRST = {"a": 0, "b": 10_000}
"""The tokens of each source count up from here, so that a token says where it was read."""
STAGES: list[dict[str, Any]] = [
    {"name": "short", "mix": {"a": 0.6, "b": 0.4}, "samples": 40, "sequence_length": 4, "global_batch_size": 8},
    {"name": "long", "mix": {"a": 1, "b": 1}, "steps": 5, "global_batch_size": 4, "micro_batch_size": 1},
    {"name": "rest", "take": {"b": {"epochs": 1}, "a": {"tokens": 64}}, "global_batch_size": 4},
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TokenFile]:
    folder = tmp_path_factory.mktemp("files")
    found = {}
    for name, count in SAMPLES.items():
        tokens = np.arange(FIRST[name], FIRST[name] + count * 8 + 1, dtype=np.uint16)
        tokens.tofile(folder / f"{name}.bin")
        found[name] = TokenFile(folder / name, len(tokens))
    return found


def stream_of(
    plan: RunPlan, files: dict[str, TokenFile], rank: int = 0, size: int = 1, workers: int = 0, vocab: int = 20_000
) -> BlendStream:
    samples = PlannedSamples(plan, files, vocab_size=vocab)
    return BlendStream(
        samples, PlannedShapes(plan, rank, size), seed=7, device=torch.device("cpu"), num_workers=workers
    )


def expected(plan: RunPlan, first: int, count: int) -> list[tuple[int, int]]:
    """First token and length of samples, by the plan."""
    places = [plan.place(sample) for sample in range(first, first + count)]
    return sorted((FIRST[place.source] + place.start, place.length) for place in places)


def rows(batch: list[Any]) -> list[tuple[int, int]]:
    found = []
    for micro in batch:
        for tokens, labels in zip(micro.tokens.tolist(), micro.labels.tolist(), strict=True):
            assert tokens == list(range(tokens[0], tokens[0] + len(tokens)))
            assert labels == [token + 1 for token in tokens]
            found.append((tokens[0], len(tokens)))
    return found


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]), st.integers(1, 6)), min_size=3, max_size=9)
)
def test_every_job_reads_on_where_the_last_stopped(
    files: dict[str, TokenFile], jobs: list[tuple[int, int, int]]
) -> None:
    at, progress = 0, None
    for ranks, micro, steps in jobs:
        stages = [{"micro_batch_size": micro if ranks < 4 else 1, **stage} for stage in STAGES]
        plan = planned(SAMPLES, stages, progress=progress)
        streams = [stream_of(plan, files, rank, ranks) for rank in range(ranks)]
        for stream in streams:
            stream.seek(Position(at))
        for _ in range(steps):
            if at == plan.total_samples:
                break
            batch = plan.stage_of_sample(at).global_batch_size
            read = sorted(row for stream in streams for row in rows(stream.next()))
            assert read == expected(plan, at, batch)
            at += batch
            position = streams[0].position()
            assert (position.samples, list(position.sources)) == (at, plan.source_counts(at))
        progress = stored(plan, at)


def test_consumption_is_what_was_read_of_each_source_whoever_begins_where(files: dict[str, TokenFile]) -> None:
    plan = planned(SAMPLES, STAGES)
    stream, names = stream_of(plan, files), list(plan.numbers)
    tokens = dict.fromkeys(names, 0)
    for step in range(plan.total_steps):
        for micro in stream.next():
            for source in micro.sources.tolist():
                tokens[names[source]] += micro.tokens.shape[1]
        consumption = stream.consumption()
        assert {name: use.tokens for name, use in consumption.sources.items()} == tokens
        assert consumption.stage == plan.stage_of_step(step).name
        again = stream_of(plan, files)
        again.seek(Position(stream.position().samples))
        assert again.consumption() == consumption
    assert consumption.sources["a"].epochs == tokens["a"] / (SAMPLES["a"] * 8)


def test_the_place_of_a_sample_is_where_its_tokens_stand(files: dict[str, TokenFile]) -> None:
    plan = planned(SAMPLES, STAGES)
    samples, seen = PlannedSamples(plan, files, vocab_size=20_000), dict.fromkeys(plan.numbers, 0)
    for position in range(plan.total_samples):
        place, tokens = samples.place(position), samples[position]["tokens"].tolist()
        first = tokens[0] - FIRST[place.source]
        assert place.where == f"tokens {first:,} to {first + len(tokens) - 1:,} of {files[place.source].path}"
        assert place.number == seen[place.source]
        seen[place.source] += 1


def test_workers_read_ahead_over_the_borders_of_stages(files: dict[str, TokenFile]) -> None:
    plan = planned(SAMPLES, STAGES)
    alone, ahead = stream_of(plan, files), stream_of(plan, files, workers=2)
    for step in range(plan.total_steps):
        mine, theirs = alone.next(), ahead.next()
        assert [m.tokens.tolist() for m in mine] == [m.tokens.tolist() for m in theirs]
        assert [m.sources.tolist() for m in mine] == [m.sources.tolist() for m in theirs]
        assert {m.tokens.shape[1] for m in mine} == {plan.stage_of_step(step).sequence_length}
    assert alone.position() == ahead.position() == Position(plan.total_samples, 2, tuple(alone.position().sources))
    ahead.close()
    with pytest.raises(DataError, match="sample .* is wanted"):
        alone.next()


def test_samples_go_to_other_processes_without_their_files(files: dict[str, TokenFile]) -> None:
    samples = PlannedSamples(planned(SAMPLES, STAGES), files, vocab_size=20_000, eod=FIRST["b"])
    before = samples[0]
    again = pickle.loads(pickle.dumps(samples))
    assert torch.equal(again[0]["tokens"], before["tokens"])
    masks = [samples[n]["loss_mask"] for n in range(len(samples))]
    # The only end-of-document token is the first of b, which is read twice in all.
    assert sum(int((mask == 0).sum()) for mask in masks) == sum(
        FIRST["b"] in samples[n]["tokens"].tolist() for n in range(len(samples))
    )


def test_damaged_files_are_one_clear_error(files: dict[str, TokenFile], tmp_path: Path) -> None:
    plan = planned(SAMPLES, STAGES)
    with pytest.raises(DataError, match=r"a\.bin: token id \d+ is none of the tokenizer's 5: the file was damaged"):
        stream_of(plan, files, vocab=5).next()
    (tmp_path / "a.bin").write_bytes(b"\0" * 16)
    short = {**files, "a": TokenFile(tmp_path / "a", 8)}
    with pytest.raises(DataError, match=r"a\.bin ends before token"):
        PlannedSamples(plan, short, vocab_size=20_000)[0]
    with pytest.raises(DataError, match=r"gone\.bin: cannot be read"):
        TokenFile(tmp_path / "gone", 8).read(0, 1)


def test_a_plain_blend_without_a_cache_needs_neither_index_nor_other_ranks(tmp_path: Path) -> None:
    for n in range(2):
        corpus = write_corpus(tmp_path / f"{n}.jsonl", documents=30, seed=n)
        if n == 0:
            train_tokenizer([corpus], tmp_path / "t", 320)
        preprocess([corpus], tmp_path / "t", tmp_path / f"d{n}", split=(1, 0, 0))
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    sources = [DataSource(path=str(tmp_path / f"d{n}" / "train"), weight=n + 1) for n in range(2)]
    data = DataConfig(sequence_length=16, train=sources, tokenizer=str(tmp_path / "t"))
    tokenizer = Tokenizer(data.tokenizer)
    blend = build_blend(data.train, data, tokenizer, num_samples=90, seed=3)
    assert list(blend.counts(0, 90)) == [30, 60]
    again = build_blend(data.train, data, tokenizer, num_samples=5000, seed=3)
    assert all(torch.equal(blend[n]["tokens"], again[n]["tokens"]) for n in range(90))
    turned = replace(data, train=sources[::-1])
    other = build_blend(turned.train, turned, tokenizer, num_samples=90, seed=3)
    assert all(torch.equal(blend[n]["tokens"], other[n]["tokens"]) for n in range(90))
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == before
