"""The record of a run: complete lines, one report a step, whatever interrupted it."""

import json
import math
import resource
import signal
import tracemalloc
from pathlib import Path

import pytest

from megatron_ext.monitoring.metrics_file import MetricsFile, read_metrics


def write(path: Path, *records: dict[str, object]) -> None:
    file = MetricsFile(path)
    for record in records:
        file.write(record)
    file.close()


def test_repeated_steps_are_reported_once(tmp_path: Path) -> None:
    path = tmp_path / "deeper" / "metrics.jsonl"
    write(path, {"event": "start", "iteration": 0}, *({"iteration": n, "loss": n / 10} for n in (1, 2, 3, 4)))
    # Killed after step 4, continued from the checkpoint of step 2.
    write(path, {"event": "start", "iteration": 2}, *({"iteration": n, "loss": n} for n in (3, 4, 5)))
    assert [(r["iteration"], r["loss"]) for r in read_metrics(path)] == [(1, 0.1), (2, 0.2), (3, 3), (4, 4), (5, 5)]


def test_what_came_after_the_checkpoint_goes_to_a_file_beside(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    start = {"event": "start", "iteration": 0}
    # As an older version left it: steps 3 and 4 twice; and a line that a kill cut off.
    write(path, start, *({"iteration": n, "loss": 0.5} for n in (1, 2, 3, 4)))
    write(path, {"event": "start", "iteration": 2}, *({"iteration": n, "loss": float(n)} for n in (3, 4, 5, 6)))
    with open(path, "a") as file:
        file.write('{"iteration": 7, "lo')
    file = MetricsFile(path, 4)
    file.write({"event": "start", "iteration": 4})
    file.write({"iteration": 5, "loss": 5.5})
    file.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["loss"] for line in lines if "loss" in line] == [0.5, 0.5, 3.0, 4.0, 5.5]
    assert [line["iteration"] for line in lines if "event" in line] == [0, 2, 4]
    aside = (tmp_path / "metrics.superseded.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in aside] == [0.5, 0.5, 5.0, 6.0]
    MetricsFile(path, 5).close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == lines
    assert len(list(tmp_path.iterdir())) == 2


def test_a_line_of_any_length_is_read_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, {"iteration": 1, "loss": 0.5})
    with open(path, "r+b") as file:  # what a file system leaves of a file whose size alone was written
        file.truncate(100 << 20)
    write(path, {"iteration": 2, "loss": 0.25})
    tracemalloc.start()
    MetricsFile(path, 2).close()
    assert [record["iteration"] for record in read_metrics(path)] == [1, 2]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size < 200
    print(f"{peak / 2**20:.0f} MiB at most")
    assert peak < 90 << 20  # a piece, and what json makes of it


def test_what_never_ends_is_no_metrics_file() -> None:
    with pytest.raises(OSError, match="is not a regular file: '/dev/zero'"):
        read_metrics("/dev/zero")


def test_the_file_is_never_written_through_a_link(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, *({"iteration": n} for n in (1, 2)))
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "metrics.jsonl.partial").symlink_to(tmp_path / "mine")
    MetricsFile(path, 1).close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"iteration": 1}]
    assert (tmp_path / "mine").read_text() == "precious"


def test_what_happened_once_for_all_stays_and_steps_made_again_do_not(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    steps = [{"iteration": n, "loss": 0.5} for n in (1, 2, 3, 4)]
    skip, rollback = ({"event": kind, "iteration": n} for kind, n in (("skip", 4), ("rollback", 4)))
    # Gone back to step 2 within one job, which then failed at step 5.
    again = [{"iteration": n, "loss": float(n)} for n in (3, 4, 5)]
    write(path, *steps, skip, rollback, *again, {"event": "failed", "iteration": 5})
    assert [(r["iteration"], r["loss"]) for r in read_metrics(path)] == [(1, 0.5), (2, 0.5), (3, 3), (4, 4), (5, 5)]
    MetricsFile(path, 3).close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line.get("event", line.get("loss")) for line in lines] == [0.5, 0.5, "rollback", 3.0, "failed"]


def test_a_full_disk_costs_reports_and_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.write({"iteration": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))
        file.write({"iteration": 2})
        file.write({"iteration": 3})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    file.write({"iteration": 4})
    file.close()
    assert path.read_text() == '{"iteration": 1}\n{"iteration": 4}\n'
    assert [record.message.partition(": reports are lost")[0] for record in caplog.records] == [str(path)]


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, *({"iteration": n, "loss": 1.0} for n in (1, 2, 3)))
    with open(path, "a") as file:
        file.write('{"iteration": 4, "lo')
    write(path, {"event": "start", "iteration": 1}, {"iteration": 2, "loss": 2.0})
    assert [r["iteration"] for r in read_metrics(path)] == [1, 2]


def test_numbers_that_json_lacks_are_written_as_words(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, {"iteration": 1, "loss": math.nan, "expert_load": {"0": [math.inf, 1.0]}})
    record = json.loads(path.read_text(), parse_constant=lambda word: 1 / 0)
    assert record == {"iteration": 1, "loss": "nan", "expert_load": {"0": ["inf", 1.0]}}
    assert math.isnan(read_metrics(path)[0]["loss"])
