"""How long a step may take, learned from the run, and what counts as no progress."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ext.config import WatchdogConfig
from megatron_ext.runtime import liveness, standings
from megatron_ext.runtime.main_thread import Standing
from megatron_ext.runtime.watchdog import Watchdog, write_stack

MOVES = Standing(waiting=0, still=0, in_step=False, steps=0, place="")


class Time:
    """A clock that the test moves, looking every second."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("megatron_ext.runtime.watchdog.time.monotonic", lambda: self.now)

    def passes(self, dog: Watchdog, seconds: float, still: bool = False) -> str | None:
        until, why, begun = self.now + seconds, None, self.now
        while self.now < until and why is None:
            self.now += 1
            why = dog.overdue(replace(MOVES, still=self.now - begun if still else 0))
        return why


def trained(time: Time, dog: Watchdog, *seconds: float) -> None:
    for step in seconds:
        with dog.step():
            assert time.passes(dog, step) is None


LIMITS = WatchdogConfig(factor=10, minimum_minutes=1, first_step_minutes=10)


def test_the_limit_follows_the_pace_and_the_first_steps_have_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    time = Time(monkeypatch)
    dog = Watchdog(LIMITS)
    trained(time, dog, 500, 300, 20)  # they compile
    assert dog.limit() == 600
    trained(time, dog, *[4] * 20)
    with dog.step():
        assert dog.limit() == 60  # not below minimum_minutes
        why = time.passes(dog, 1000)
    assert why is not None
    assert "step 24 of this job has not ended within 60 s (the last ones took 4 s; runtime.watchdog)" in why
    trained(time, dog, *[20] * 32)
    with dog.step():
        assert dog.limit() == 200


def test_outside_of_a_step_whatever_moves_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    time = Time(monkeypatch)
    dog = Watchdog(LIMITS)
    trained(time, dog, *[4] * 9)
    assert time.passes(dog, 5000) is None  # a long validation
    assert "nothing has moved for 600 s" in str(time.passes(dog, 5000, still=True))


def test_a_process_that_was_stopped_itself_could_not_move(monkeypatch: pytest.MonkeyPatch) -> None:
    time = Time(monkeypatch)
    dog = Watchdog(LIMITS)
    trained(time, dog, *[4] * 9)
    with dog.step():
        time.now += 9000
        assert time.passes(dog, 30) is None
    dog = Watchdog(replace(LIMITS, factor=2, minimum_minutes=0.05))
    for _ in range(40):  # during which nobody looks
        with dog.step():
            time.now += 0.1
    with dog.step():
        time.now += 0.1
        assert dog.overdue(MOVES) is None  # of this step a tenth of a second has passed, not four
        assert "has not ended within 3 s" in str(time.passes(dog, 10))
    dog = Watchdog(replace(LIMITS, enabled=False))
    with dog.step():
        assert time.passes(dog, 5000) is None


def test_the_stack_of_every_thread_is_written(tmp_path: Path) -> None:
    write_stack(tmp_path / "a" / "b", 3, "why")
    text = (tmp_path / "a" / "b" / "rank_3.txt").read_text()
    assert text.startswith("why\n\n")
    assert "test_watchdog.py" in text
    assert "in test_the_stack_of_every_thread_is_written" in text
    (tmp_path / "file").write_text("")
    write_stack(tmp_path / "file" / "b", 3, "why")  # said all the same


def test_a_file_system_that_hangs_does_not_hold_up_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    hangs, told, codes = threading.Event(), list[str](), list[int]()
    for module in (liveness, standings):
        monkeypatch.setattr(module, "FILES", 0.05)
    monkeypatch.setattr(standings, "write_stack", lambda *arguments: hangs.wait(60))
    monkeypatch.setattr(liveness, "release_all", lambda: hangs.wait(60))
    monkeypatch.setattr(liveness.os, "_exit", codes.append)
    watching = liveness.Liveness(LIMITS, tmp_path, lambda kind, text, ends: told.append(kind))
    watching._end_stalled("nothing moves", MOVES)
    hangs.set()
    assert (codes, told) == ([2], ["stall"])
    assert "error: nothing moves. It is at " in capfd.readouterr().err


def test_after_a_failed_collective_a_rank_of_another_host_that_is_silent_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[int] = []
    monkeypatch.setattr(liveness, "BEAT", 0.02)
    watching = liveness.Liveness(LIMITS)
    hearts, beats = watching._hearts, iter(range(1000))
    hearts.store = object()
    monkeypatch.setattr(hearts, "missing", lambda: None)
    monkeypatch.setattr(hearts, "all_heard", lambda: [str(next(beats)), str(next(beats)), "7"])  # rank 2 has died
    monkeypatch.setattr(watching._words, "say_lost", lambda lost, silence, ends: said.append(lost))
    with pytest.raises(SystemExit):
        watching.end_if_missing(patience=0.01)
    assert said == [2]
