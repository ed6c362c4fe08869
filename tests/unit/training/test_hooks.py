"""Reports and validation, each alone with a session that computes nothing."""

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_ext.data.stream.position import Position
from megatron_ext.errors import CheckpointError, DataError
from megatron_ext.monitoring.clock import Clock
from megatron_ext.monitoring.events import Event
from megatron_ext.monitoring.metrics_file import read_metrics
from megatron_ext.monitoring.sources import ValidationReport
from megatron_ext.planning.room import bytes_on_disk
from megatron_ext.training.hooks.base import Hook, StepDone
from megatron_ext.training.hooks.disk_room import DiskRoom
from megatron_ext.training.hooks.reports import Reports
from megatron_ext.training.hooks.validation import Validation
from megatron_ext.training.loop import open_and_train
from megatron_ext.training.signals import EXIT_AT
from megatron_ext.training.step import StepResult
from megatron_ext.training.verdict import Rollback, Skip, Take
from megatron_ext.training.watch import watching
from tests.support.webhook_server import WebhookServer
from tests.unit.training.fakes import FakeSession, Numbers, fake_session, sources

VALIDATED = {"validation": [{"path": "b"}]}


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def done(session: FakeSession, verdict: Any = None, signal: int = 0, **losses: float) -> StepDone:
    """The session's next step."""
    first = session.stream.position().samples
    if isinstance(verdict, Skip):
        session.pass_over()
        return StepDone(session.state.iteration, 6, verdict, first)
    session.step(session.stream.next())
    named = {name: torch.tensor(value) for name, value in losses.items()}
    result = StepResult(named, 0.7, Take(), 0, sources(12, 4 * (session.state.iteration % 2), loss=losses["loss"]))
    return StepDone(session.state.iteration, 6, Take(), first, result, signal)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("ends", [False, True])
def test_reports_say_that_a_rank_is_lost_and_that_the_run_ends_of_it(ends: bool, tmp_path: Path) -> None:
    session = fake_session(tmp_path)
    reports = Reports(session.run, session.layout, Clock())
    reports.on_start(session)
    reports.on_stall(Event("lost_rank", 0, "rank 3 has ended"), ends=ends)
    _, *said = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert [line["event"] for line in said] == ["lost_rank", "failed"][: 1 + ends]
    assert all("rank 3 has ended" in line["text"] for line in said)


@pytest.mark.usefixtures("alone")
def test_reports_name_every_sum_of_the_task_and_every_skip(tmp_path: Path) -> None:
    session = fake_session(tmp_path, logging={"log_interval": 2})
    session.groups.world = dist.group.WORLD
    reports = Reports(session.run, session.layout, Clock())
    reports.on_start(session)
    reports.after_step(session, done(session, loss=3.0, accuracy=0.25))
    reports.after_step(session, done(session, loss=2.0, accuracy=0.5))
    reports.after_step(session, done(session, Skip("a spike")))
    reports.after_step(session, done(session, signal=15, loss=1.0, accuracy=1.0))
    reports.validation(4, ValidationReport(1.5, {}))
    reports.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    start, first, skip, second, validation, stopped = map(json.loads, lines)
    assert [first[key] for key in ("iteration", "loss", "accuracy", "consumed_samples")] == [2, 2.0, 0.5, 16]
    assert [skip[key] for key in ("event", "iteration", "first_sample", "last_sample")] == ["skip", 3, 16, 23]
    assert (second["iteration"], second["loss"]) == (4, 1.0)
    # Over both steps since the start; then over the one that was computed. Numbers counts three tokens a sample.
    assert first["sources"] == {
        "ja": {"loss": 2.5, "supervised_tokens": 12, "consumed_tokens": 48, "epochs": 0.5},
    }
    assert second["sources"] == {"ja": {"loss": 1.0, "supervised_tokens": 12, "consumed_tokens": 96, "epochs": 0.5}}
    assert validation["validation_loss"] == 1.5
    assert (start["event"], start["text"]) == ("start", "started, of 100 steps, on 1 process")
    assert (stopped["event"], stopped["iteration"]) == ("stopped", 4)
    assert stopped["text"].startswith("stopped by SIGTERM at step 4 of 100, after ")


@pytest.mark.usefixtures("alone")
def test_a_stage_ends_with_a_report_and_what_was_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    session = fake_session(tmp_path, logging={"log_interval": 5})
    session.groups.world = dist.group.WORLD
    read = session.stream.consumption
    session.stream.consumption = lambda: replace(read(), stage="first")  # type: ignore[method-assign]
    reports = Reports(session.run, session.layout, Clock())
    reports.on_start(session)
    reports.after_step(session, done(session, loss=3.0))
    reports.after_step(session, replace(done(session, loss=2.0, signal=EXIT_AT), ends_stage=True))
    reports.close()
    _, step, stage, stopped = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (step["iteration"], step["stage"]) == (2, "first")
    assert stage["event"] == "stage"
    assert stopped["text"].startswith("stopped by train.exit_at at step 2 of 100, after ")
    assert "step 2: stage first is over: ja 48 tokens (0.5 epochs), en 0 tokens (0 epochs)" in caplog.messages


@pytest.mark.usefixtures("alone")
def test_reports_by_seconds_follow_the_pace_and_say_what_the_time_went_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    class Lagging(Hook):
        def figures(self) -> Mapping[str, float]:
            return {"checkpoint_lag_steps": 3.0}

    session = fake_session(tmp_path, [Lagging()], logging={"log_interval": 2, "log_interval_seconds": 40})
    session.groups.world = dist.group.WORLD
    reports = Reports(session.run, session.layout, Clock())
    reports.on_start(session)
    for seconds in [10.0, *[2.0] * 24]:  # the first step is slow
        for part, share in (("data", 0.25), ("forward_backward", 0.75)):
            now[0] += share * seconds
            session.mark(part)
        reports.after_step(session, replace(done(session, loss=3.0), last=100))
    reports.close()
    steps = read_metrics(tmp_path / "metrics.jsonl")
    # Two steps of 6 s say that 7 take 40 s, which of 2 s are 20.
    assert [step["iteration"] for step in steps] == [2, 9]
    assert steps[1]["step_seconds"] == {"data": 0.5, "forward_backward": 1.5}
    assert steps[1]["seconds_per_step"] == 2
    assert steps[1]["figures"] == {"checkpoint_lag_steps": 3.0}
    assert reports._next == 29


@pytest.mark.usefixtures("alone")
def test_steps_that_are_passed_over_count_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    session = fake_session(tmp_path)
    session.groups.world = dist.group.WORLD
    reports = Reports(session.run, session.layout, Clock())
    reports.on_start(session)

    def take(verdict: Any = None, seconds: float = 4.0) -> None:
        now[0] += seconds
        reports.after_step(session, replace(done(session, verdict, loss=3.0), last=100))

    take()
    take(Skip("train.skip_steps"), seconds=0.0)
    take()
    # Weights of an earlier checkpoint, and over the data up to step 9: the time of the step that was bad is lost.
    now[0] += 4
    session.state = replace(session.state, iteration=9)
    back = StepDone(9, 100, Rollback("a spike", tmp_path, 9), 0, StepResult({}, 0.7, Take(), 0, sources(0, 0)))
    reports.after_step(session, back)
    take()
    reports.close()
    steps = read_metrics(tmp_path / "metrics.jsonl")
    assert [(step["iteration"], step["seconds_per_step"]) for step in steps] == [(1, 4), (3, 4), (10, 8)]
    assert [step["tokens_per_second"] for step in steps] == [8 * 64 / 4, 8 * 64 / 4, 8 * 64 / 8]


@pytest.mark.usefixtures("alone")
def test_too_little_room_for_checkpoints_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session, told, free = fake_session(tmp_path, train={"train_iters": 6}), list[Event](), [0]
    run = replace(session.run, checkpoint=replace(session.run.checkpoint, save_interval=2))
    each = bytes_on_disk(run)
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=free[0]))
    hook = DiskRoom(run, told.append)
    free[0] = 3 * each
    hook.on_start(session)
    assert told == []
    free[0] = 2 * each
    hook.after_save(tmp_path)
    free[0] = each - 1
    for _ in range(2):
        hook.after_save(tmp_path)
    free[0] = 9 * each
    hook.after_save(tmp_path)
    assert [event.kind for event in told] == ["disk", "disk"]
    assert "too little for the 3 checkpoints to come, of about " in told[0].text
    assert "too little for the next checkpoint, of about " in told[1].text


@pytest.mark.usefixtures("alone")
def test_a_run_that_fails_says_with_what(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    session = fake_session(tmp_path)
    session.groups.world = dist.group.WORLD
    reports = Reports(session.run, session.layout, Clock())
    reports.on_start(session)
    reports.after_step(session, done(session, loss=3.0))
    reports.on_error(ValueError("a bad thing"))
    *_, failed = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert [failed[key] for key in ("event", "iteration", "text", "error")] == [
        "failed",
        1,
        "failed: ValueError: a bad thing",
        "ValueError",
    ]
    assert caplog.records[-1].levelname == "ERROR"
    reports.on_error(SystemExit(2))  # of the main thread, after the watchdog's
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.usefixtures("alone")
def test_people_are_told_of_a_run_that_fails_before_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = WebhookServer()
    monkeypatch.setenv("HOOK", server.url)
    session = fake_session(tmp_path / "moe", alerts={"webhook": {"url_variable": "HOOK"}})
    Reports(session.run, session.layout, Clock()).on_error(CheckpointError("iter_0000004: sizes differ"))
    server.close()
    (text,) = server.texts
    assert text.startswith(":x: *moe: failed*\nstep 0: failed before its first step: iter_0000004: sizes differ\n")


@pytest.mark.usefixtures("alone")
def test_people_are_told_of_a_run_whose_data_is_gone_when_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = WebhookServer()
    monkeypatch.setenv("HOOK", server.url)
    session = fake_session(tmp_path, alerts={"webhook": {"url_variable": "HOOK"}})
    for is_known in (False, True):  # of a run that has never reported whoever starts it reads the error
        if is_known:
            (tmp_path / "metrics.jsonl").write_text('{"event": "start", "iteration": 0}\n')
        groups, run = SimpleNamespace(dp=dist.group.WORLD), session.run
        with pytest.raises(DataError, match="no tokenizer here"), watching(run) as others:
            open_and_train(run, session.layout, groups, torch.device("cpu"), others)
    server.close()
    (text,) = server.texts
    assert "failed before its first step: t: no tokenizer here" in text


def test_the_w_and_b_run_goes_on_where_a_checkpoint_has_one(tmp_path: Path) -> None:
    session = fake_session(tmp_path)
    reports = Reports(session.run, session.layout, Clock())
    fresh = reports.state()["wandb_run_id"]
    for kept in ({}, {"wandb_run_id": None}):  # of a checkpoint that no run has written
        reports.restore(kept)
        assert reports.state() == {"wandb_run_id": fresh}
    reports.restore({"wandb_run_id": "abcd1234"})
    assert reports.state() == {"wandb_run_id": "abcd1234"}
    with pytest.raises(ValueError, match="wandb_run_id is 7"):
        reports.restore({"wandb_run_id": 7})


def test_validation_reads_the_same_batches_each_time_and_none_before_a_stop(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    session = fake_session(tmp_path, train={"eval_interval": 2, "eval_iters": 3}, data=VALIDATED)
    read: list[list[int]] = []
    losses = {"loss": 1.5}, [(1.5, 12), (None, 0)]
    session.validate = lambda batches, _: read.append([b[0].number for b in batches]) or ({**losses[0]}, losses[1])  # type: ignore[func-returns-value]
    told: list[tuple[int, ValidationReport]] = []
    stream = Numbers()
    hook = Validation(session.run.train, stream, Clock(), lambda iteration, report: told.append((iteration, report)))
    caplog.set_level(logging.INFO)
    hook.on_start(session)
    steps = [done(session, loss=1.0) for _ in range(6)]
    for step in (*steps[:4], replace(steps[3], signal=15)):
        hook.after_step(session, step)
    assert told == [(step, ValidationReport(1.5, {"ja": 1.5})) for step in (2, 4)]
    assert "validation on 24 ja, 0 en samples" in caplog.text
    assert "validation says nothing of en, whose share of 24 samples is none: raise train.eval_iters" in caplog.text
    assert read == [[0, 1, 2]] * 2
    assert stream.position() == Position()


def test_the_clock_stands_still_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    clock = Clock()
    begun = clock.now()
    now[0] += 5
    with clock.stopped():
        now[0] += 1000
    now[0] += 2
    assert clock.now() - begun == 7
