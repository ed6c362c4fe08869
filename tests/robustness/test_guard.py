"""Faults in whole runs: a flipped bit, a poisoned batch, a learning-rate bomb; what the guard does, resumed or not."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.checkpoint.streams import MegatronSource
from megatron_ext.data.stream.stream import Batch
from megatron_ext.testing.pool import GlooPool
from megatron_ext.training.guard.history import history_rows, read_history
from megatron_ext.training.guard.rollbacks import PastRollback
from megatron_ext.training.session import Session
from megatron_ext.training.step import StepResult, never
from tests.robustness.runs import train_here


@contextmanager
def before_each_step(act: Callable[[Session, int, Batch], Batch]) -> Iterator[None]:
    """Call `act` with the number of the step, counted from 1, before each step of a session; it returns the batch."""
    usual = Session.step

    def step(self: Session, batch: Batch, asks_to_stop: Callable[[], bool] = never) -> StepResult:
        return usual(self, act(self, self.state.iteration + 1, batch), asks_to_stop)

    Session.step = step  # type: ignore[method-assign]
    try:
        yield
    finally:
        Session.step = usual  # type: ignore[method-assign]


def flip_a_bit(path: Path, overrides: list[str], at: int) -> None:
    """Train; before step `at` the highest bit of the exponent of a weight flips."""

    def act(session: Session, step: int, batch: Batch) -> Batch:
        if step == at and session.groups.is_last_stage:
            weight = session.chunks[-1].output_layer.weight.data.view(-1)
            weight.view(torch.int32)[7] ^= 1 << 30
        return batch

    with before_each_step(act):
        train_here(path, overrides)


def train_as_after(path: Path, overrides: list[str], past: PastRollback) -> None:
    """Train, with the learning rate that rises after a rollback."""

    def act(session: Session, step: int, batch: Batch) -> Batch:
        session.rate_factor = past.rate_factor
        return batch

    with before_each_step(act):
        train_here(path, overrides)


def records(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def losses(directory: Path) -> list[tuple[Any, ...]]:
    keys = ("iteration", "loss", "grad_norm", "learning_rate", "consumed_samples")
    return [
        tuple(record[key] for key in keys)
        for record in records(directory)
        if "loss" in record and "event" not in record
    ]


def test_a_flipped_bit_goes_back_to_good_weights_as_if_the_steps_since_had_been_passed_over(
    work: Path, pool: GlooPool
) -> None:
    run, again = work / "flipped", work / "passed"
    keys = ["train.train_iters=12", "schedule.kind=constant"]
    guard = [
        "max_nonfinite_in_row=1",
        "rollback.min_steps_back=1",
        "rollback.pass_over_steps=3",
        "rollback.rewarm_steps=4",
    ]
    overrides = [*keys, "parallel.pipeline_model_parallel_size=2"]
    pool.run(
        2,
        flip_a_bit,
        work / "run.yaml",
        [*overrides, *(f"guard.{key}" for key in guard), f"checkpoint.directory={run}"],
        7,
    )
    events = [record for record in records(run) if record.get("event") in ("nonfinite", "skip", "rollback")]
    assert [(one["event"], one["iteration"]) for one in events] == [
        ("nonfinite", 7), ("skip", 7), ("nonfinite", 8), ("rollback", 8),
    ]  # fmt: skip
    print(*events, sep="\n")
    found = [one for one in events if one["event"] == "nonfinite"]
    assert {(one["rank"], one["where"], one["phase"]) for one in found} == {(1, "output_layer.weight", "norm")}
    # Step 6 was the last good one, and 5 the newest to go back to.
    past = PastRollback(step=8, checkpoint=4, resumed=8, rewarm=4)
    assert {key: events[-1][key] for key in past.to_json()} == past.to_json()
    rates = [rate for step, _, _, rate, _ in losses(run) if step > 8]
    assert rates == [1e-3 * part / 4 for part in (1, 2, 3, 4)]
    # The same from that checkpoint, with the steps in train.skip_steps, bit for bit.
    shutil.copytree(run / "iter_0000004", again / "iter_0000004")
    passed = [*overrides, "train.skip_steps=[[5, 8]]", f"checkpoint.directory={again}"]
    pool.run(2, train_as_after, work / "run.yaml", passed, past)
    assert losses(again) == [record for record in losses(run) if record[0] > 8]
    ours, theirs = MegatronSource(run), MegatronSource(again)
    assert all(torch.equal(ours.read(name), theirs.read(name)) for name in ours.specs)


POISONED, BOMB = 76, range(90, 100)


def poison_and_bomb(path: Path, overrides: list[str]) -> None:
    """Train; a batch asks for what no text has, and later the learning rate is far too high for ten steps."""

    def act(session: Session, step: int, batch: Batch) -> Batch:
        guard = next(hook for hook in session.hooks if hook.name == "guard")
        session.rate_factor = lambda step: guard.rate_factor(step) * (300.0 if step + 1 in BOMB else 1.0)
        if step == POISONED:
            return [replace(micro, labels=torch.full_like(micro.labels, 329)) for micro in batch]
        return batch

    with before_each_step(act):
        train_here(path, overrides)


def test_a_poisoned_batch_is_skipped_and_a_bomb_rolled_back_alike_in_a_run_that_is_interrupted(
    work: Path, pool: GlooPool
) -> None:
    keys = [
        "train.train_iters=130",
        "schedule.kind=constant",
        "checkpoint.save_interval=20",
        "guard.spikes.max_skips=2",
    ]
    keys += [
        f"guard.rollback.{key}" for key in ("min_steps_back=20", "sustained_steps=5", "pass_over_steps=35", "sigma=2.0")
    ]
    for name, stops in (("whole", [130]), ("interrupted", [93, 130])):
        for stop in stops:
            overrides = [*keys, f"checkpoint.directory={work / name}", f"train.stop_at_iteration={stop}"]
            pool.run(1, poison_and_bomb, work / "run.yaml", overrides)
    told = ("spike", "skip", "rollback")
    whole, interrupted = (
        [(one["event"], one["iteration"], one["text"]) for one in records(work / name) if one.get("event") in told]
        for name in ("whole", "interrupted")
    )
    print(*whole, sep="\n")
    assert whole == interrupted
    assert losses(work / "whole") == losses(work / "interrupted")
    assert whole[:2] == [("spike", POISONED, whole[0][2]), ("skip", POISONED, whole[1][2])]
    assert [event for event, _, _ in whole].count("rollback") == 1
    back = next(record for record in records(work / "whole") if record.get("event") == "rollback")
    assert back["checkpoint"] in (60, 80)
    assert back["step"] in range(94, 110)
    by_step = {step: loss for step, loss, *_ in losses(work / "whole")}
    assert max(by_step[step] for step in range(91, back["step"]) if step in by_step) > by_step[70] + 1
    assert by_step[130] < by_step[70] + 0.2
    assert all(map(math.isfinite, by_step.values()))
    _, entries = read_history(work / "interrupted")
    kinds = [entry["kind"] for entry in entries]
    assert kinds.count("start") == 2
    assert {"spike", "skip", "rollback", "passed over"} <= set(kinds)
    rows = list(history_rows(entries))
    print(*rows, sep="\n")
    assert [row[2] for row in rows][:3] == ["start", "spike", "skip"]
    passed = next(row for row in rows if row[2] == "passed over")
    assert passed[3] == f"{(back['step'] - 1) * 8:,} to {back['resumed'] * 8 - 1:,}"


def test_keys_changed_on_the_way_and_samples_passed_over_are_in_the_history(work: Path, pool: GlooPool) -> None:
    directory = work / "levers"
    here = [f"checkpoint.directory={directory}"]
    pool.run(1, train_here, work / "run.yaml", [*here, "train.stop_at_iteration=2"])
    changed = ["optimizer.lr=5e-4", "logging.log_interval=2", "train.skip_samples=[[31, 32]]"]
    pool.run(1, train_here, work / "run.yaml", [*here, *changed])
    _, entries = read_history(directory)
    assert [(one["key"], one["old"], one["new"], one["step"]) for one in entries if one["kind"] == "lever"] == [
        ("train.skip_samples", "[]", "[[31, 32]]", 2),
        ("optimizer.lr", "0.001", "0.0005", 2),
    ]
    skips = [(one["step"], one["first_sample"], one["text"]) for one in entries if one["kind"] == "skip"]
    assert skips == [(4, 24, "train.skip_samples"), (5, 32, "train.skip_samples")]
    assert [row[:1] + row[2:] for row in history_rows(entries)][-1] == (
        "4 to 5",
        "skip",
        "24 to 39",
        "train.skip_samples",
    )


@pytest.mark.parametrize("kind", ["fp32", "bf16"])
def test_deterministic_mode_changes_nothing_on_a_cpu(kind: str, work: Path, pool: GlooPool) -> None:
    found = []
    for mode in ("false", "true", "true"):
        directory = work / f"deterministic {kind} {len(found)}"
        overrides = [f"checkpoint.directory={directory}", f"runtime.deterministic={mode}", f"precision.kind={kind}"]
        pool.run(1, train_deterministically, work / "run.yaml", overrides)
        found.append(losses(directory))
    assert found[0] == found[1] == found[2]


def train_deterministically(path: Path, overrides: list[str]) -> None:
    try:
        train_here(path, overrides)
    finally:
        torch.use_deterministic_algorithms(mode=False)
