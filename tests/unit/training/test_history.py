"""The history of a run, as a table and as JSON, and what is wrong with it."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.errors import CheckpointError
from megatron_ext.training.guard.audit import MOST, AuditLog
from megatron_ext.training.guard.history import history_rows, read_history
from tools import history


def checkpoint_with(directory: Path, **scalars: Any) -> Path:
    checkpoint = directory / "iter_0000005"
    checkpoint.mkdir()
    (checkpoint / ".metadata").touch()
    (checkpoint / "__0_0.distcp").touch()
    counts = {"iteration": 5, "consumed_samples": 40, "optimizer_steps": 5, "data": []}
    (checkpoint / "state.json").write_text(json.dumps(counts | scalars))
    return checkpoint


def test_steps_that_were_passed_over_for_one_reason_are_one_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = AuditLog()
    log.add("start", 0, "starts with 8 processes, TP2", {"world_size": 8})
    for step in (2, 3, 5):
        log.add("skip", step, "train.skip_steps", {"first_sample": step * 8 - 8, "last_sample": step * 8 - 1})
    log.add("nonfinite", 6, "not finite", {"loss": float("nan")})
    checkpoint = checkpoint_with(tmp_path, audit=log.entries())
    found, entries = read_history(tmp_path)
    assert (found, entries) == (checkpoint, log.entries())
    assert [(steps, what, samples) for steps, _, what, samples, _ in history_rows(entries)] == [
        ("0", "start", ""),
        ("2 to 3", "skip", "8 to 23"),
        ("5", "skip", "32 to 39"),
        ("6", "nonfinite", ""),
    ]
    monkeypatch.setattr("sys.argv", ["history.py", str(tmp_path), "--json"])
    history.main()
    assert json.loads(capsys.readouterr().out) == log.entries()
    monkeypatch.setattr("sys.argv", ["history.py", str(tmp_path)])
    history.main()
    printed = capsys.readouterr().out
    assert "2 to 3" in printed
    assert "5 entries" in " ".join(printed.split())


def test_the_log_is_bounded_and_keeps_its_beginning() -> None:
    log = AuditLog()
    for step in range(MOST + 10):
        log.add("skip", step, "why")
    steps = [entry["step"] for entry in log.entries()]
    assert (len(steps), steps[0], steps[1], steps[-1]) == (MOST, 0, 11, MOST + 9)


@pytest.mark.parametrize(
    ("scalars", "message"),
    [({}, "state.json has no audit"), ({"audit": [{"kind": "skip"}]}, "audit is no list of entries")],
)
def test_what_is_no_history_is_said(scalars: dict[str, Any], message: str, tmp_path: Path) -> None:
    checkpoint_with(tmp_path, **scalars)
    with pytest.raises(CheckpointError, match=message):
        read_history(tmp_path)
