"""train.exit_at: the first moment counts, one rank's clock says it, and a job that begins beyond a step goes on."""

import logging
import signal
import time
from pathlib import Path

import pytest

from megatron_ext.config import ExitAt
from megatron_ext.errors import EnvironmentFault
from megatron_ext.launcher import JOB_START
from megatron_ext.training.exit_at import exit_moment
from megatron_ext.training.signals import EXIT_AT, StopSignals, stop_name
from megatron_ext.training.verdict import Rollback
from tests.unit.training.fakes import fake_session, run, steps_of


@pytest.fixture(autouse=True)
def no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MEGATRON_EXT_JOB_END", "SLURM_JOB_END_TIME", JOB_START):
        monkeypatch.delenv(name, raising=False)


def test_the_first_moment_counts(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setenv(JOB_START, "1000.5")  # also for ranks that were started again
    assert exit_moment(ExitAt(minutes=2, time=2000)).seconds == 1120.5  # type: ignore[union-attr]
    assert "train.exit_at.minutes: saves and ends at " in caplog.text
    assert exit_moment(ExitAt(minutes=30, time="1970-01-01T00:20:00Z")).key == "train.exit_at.time"  # type: ignore[union-attr]
    assert exit_moment(ExitAt(iteration=3)) is None


def test_a_job_says_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    before = ExitAt(minutes_before_limit=5)
    assert exit_moment(before) is None
    assert "neither MEGATRON_EXT_JOB_END nor SLURM_JOB_END_TIME is set" in caplog.text
    monkeypatch.setenv("SLURM_JOB_END_TIME", "10000")
    assert exit_moment(before).seconds == 9700  # type: ignore[union-attr]
    for text in ("4 pm", "nan", "1e300"):
        monkeypatch.setenv("MEGATRON_EXT_JOB_END", text)
        with pytest.raises(EnvironmentFault, match=f"MEGATRON_EXT_JOB_END = '{text}': expected seconds since 1970"):
            exit_moment(before)


def test_a_time_that_was_over_when_the_job_began_ends_no_job(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(JOB_START, "3000")
    assert exit_moment(ExitAt(time=2000)) is None
    assert "train.exit_at.time has no effect: it was over when this job began" in caplog.text
    assert exit_moment(ExitAt(time=3060)).seconds == 3060  # type: ignore[union-attr]  # though that is over by now


def test_a_time_that_has_come_counts_as_a_signal_that_a_real_one_is_not_lost_to() -> None:
    with StopSignals(speaks=False, ends_at=time.time() + 3600) as later:
        assert not later.is_noted()
    with StopSignals(speaks=False, ends_at=time.time()) as now:
        assert now.is_noted()
        assert (now.number, stop_name(now.number)) == (EXIT_AT, "train.exit_at")
    with StopSignals(speaks=False, ends_at=time.time()) as both:
        both._note(signal.SIGTERM, None)
        assert both.is_noted()
        assert (both.number, stop_name(both.number)) == (signal.SIGTERM, "SIGTERM")


def test_a_job_ends_after_the_step_and_one_that_begins_there_goes_on(tmp_path: Path) -> None:
    session = fake_session(tmp_path, train={"train_iters": 5, "exit_at": {"iteration": 2}})
    number, told = run(session)
    assert (number, steps_of(told), told[-1].signal) == (EXIT_AT, [1, 2], EXIT_AT)
    number, told = run(session)
    assert (number, steps_of(told)) == (0, [3, 4, 5])
    # The last step of the run ends it as planned, and one that is passed over ends a job too.
    session = fake_session(tmp_path, train={"train_iters": 3, "exit_at": {"iteration": 3}})
    assert run(session)[0] == 0
    session = fake_session(tmp_path, train={"train_iters": 5, "exit_at": {"iteration": 2}, "skip_steps": [[2, 3]]})
    assert steps_of(run(session)[1]) == [1, 2]
    # A rollback may pass over it.
    session = fake_session(tmp_path, train={"train_iters": 9, "exit_at": {"iteration": 5}})
    session.verdicts = {4: Rollback("gone wrong", Path("iter_0000001"), 6)}
    number, told = run(session)
    assert (number, steps_of(told)) == (EXIT_AT, [1, 2, 3, 6])
    number, told = run(session)
    assert (number, steps_of(told)) == (0, [7, 8, 9])
