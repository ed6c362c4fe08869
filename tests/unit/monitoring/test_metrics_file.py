"""The record of a run: complete lines, one report a step, whatever interrupted it."""

import json
import math
from pathlib import Path

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
