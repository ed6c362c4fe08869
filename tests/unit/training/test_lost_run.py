"""What a save that was ended says of a run without a checkpoint: its first one lost nothing, any other one all."""

import json
from pathlib import Path

import pytest

from megatron_ext.errors import CheckpointError
from megatron_ext.training.lost_run import begins_anew


def reports(directory: Path, *records: dict[str, object]) -> Path:
    metrics = directory / "metrics.jsonl"
    metrics.write_text("".join(json.dumps({"text": "", **record}) + "\n" for record in records))
    return metrics


START = {"event": "start", "iteration": 0}
STEPS: list[dict[str, object]] = [{"iteration": 1, "loss": 2.0}, {"iteration": 2, "loss": 1.9}]
SAVED = {"event": "checkpoint", "iteration": 2}


def test_a_run_that_was_ended_in_its_first_save_begins_anew_and_says_so(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    assert begins_anew(tmp_path, metrics) is None
    (tmp_path / "iter_0000002.partial").mkdir()
    for records in ([], [START, *STEPS], [START, *STEPS, SAVED, START, *STEPS]):  # the last began anew on purpose
        said = begins_anew(tmp_path, reports(tmp_path, *records) if records else metrics)
        assert said == "its first save was ended (iter_0000002.partial): nothing else was lost, and it begins anew"


def test_a_run_that_had_checkpoints_is_no_new_run(tmp_path: Path) -> None:
    (tmp_path / "iter_0000004.partial").mkdir()
    # It had gone on from step 2, which its reports still say.
    metrics = reports(tmp_path, START, *STEPS, SAVED, {"event": "start", "iteration": 2}, {"iteration": 3, "loss": 1.8})
    way_out = (
        r"has iter_0000004\.partial, .* by .*metrics\.jsonl there was one of step 2\. Bring it back, or start anew"
    )
    with pytest.raises(CheckpointError, match=way_out):
        begins_anew(tmp_path, metrics)
