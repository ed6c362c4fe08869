"""What speaks against a job: layout, memory, time, and places that not every node sees."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.launching.check import Findings, check_job
from megatron_ext.launching.job_file import Job
from tests.support.minimal_run import load, mapping
from tests.unit.launching.jobs import job, profile


def run(directory: Path, **sections: Any) -> Any:
    data = {"tokenizer": str(directory / "tok"), "train": [{"path": str(directory / "a")}], "cache_dir": str(directory)}
    checkpoint = {"directory": str(directory / "run")}
    return load(mapping(data=data, checkpoint=checkpoint, **{"train": {"global_batch_size": 64}, **sections}))


def found(job: Job, configuration: Any, steps: int = 1000) -> Findings:
    return check_job(job, configuration, steps)


def test_a_job_that_fits_says_what_it_is(tmp_path: Path) -> None:
    cluster = profile(gpu_memory_gib=80, peak_tflops=989, shared=[str(tmp_path), "/"])
    findings = found(job(tmp_path, cluster), run(tmp_path))
    assert (findings.faults, findings.warnings) == ([], [])
    assert "16 processes: TP 1 x CP 1 x DP 16 x PP 1" in findings.notes[0]
    assert "of state a step takes" in findings.notes[1]
    assert "a guess: 35% of the peak, nothing was measured" in findings.notes[2]


def test_time_is_measured_where_the_run_has_been(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    records = [{"iteration": step, "loss": 2.0, "seconds_per_step": 30.0} for step in range(1, 101)]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    cluster = profile(shared=["/"], max_requeues=2)
    findings = found(job(tmp_path, cluster, seconds=3 * 3600), run(tmp_path), 2000)
    # 1,900 steps of 30 s in jobs of 3 h without ten minutes
    assert any("1,900 steps of about 30 s (as measured in " in note and "6 jobs" in note for note in findings.notes)
    assert any("about 6 jobs of --time, and max_requeues = 2" in warning for warning in findings.warnings)


@pytest.mark.parametrize(
    ("cluster", "job_values", "sections", "message"),
    [
        ({}, {"nodes": 3}, {}, "--nodes 3 x 8: train.global_batch_size = 64 is not a multiple of"),
        ({"gpu_memory_gib": 0.001}, {}, {}, "GiB on the fullest rank, and a GPU has 0.001: split the model"),
        ({"longest_hours": 24}, {}, {}, "--time is 1 d 12 h, and mine takes 24 h"),
        ({}, {"seconds": 600}, {}, "minutes_before_limit = 10 are for saving: nothing is left to train"),
        (
            {"shared": ["/nowhere"]},
            {},
            {},
            "data.train.0.path = {0}/a: not every node sees it; below /nowhere it would be",
        ),
    ],
    ids=["layout", "memory", "longest", "too short", "not shared"],
)
def test_what_cannot_run_is_a_fault(cluster: Any, job_values: Any, sections: Any, message: str, tmp_path: Path) -> None:
    findings = found(job(tmp_path, profile(**{"shared": ["/"], **cluster}), **job_values), run(tmp_path, **sections))
    assert any(message.format(tmp_path) in fault for fault in findings.faults), findings.faults


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    faults = found(job(tmp_path, profile(shared=["/nowhere"]), nodes=3, seconds=600), run(tmp_path)).faults
    words = ("--nodes 3 x 8: ", "nothing is left to train", "not every node sees it")
    assert [word for word in words if not any(word in fault for fault in faults)] == []


def test_tensor_parallelism_across_nodes_is_warned_of(tmp_path: Path) -> None:
    split = run(tmp_path, parallel={"tensor_model_parallel_size": 4})
    within, across = (
        found(job(tmp_path, profile(gpus_per_node=gpus, shared=["/"]), nodes=8 // gpus), split).warnings
        for gpus in (4, 2)
    )
    assert within == []
    assert across == [
        "parallel.tensor_model_parallel_size = 4 is more than the 2 GPUs of a node: every layer would wait for the "
        "network"
    ]


def test_a_local_disk_is_warned_of_on_several_nodes_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_ext.launching.check._file_system", lambda place: "ext4")
    two = job(tmp_path, profile())
    [warning] = found(two, run(tmp_path)).warnings
    assert "on a disk of this machine alone, as it seems" in warning
    assert f"data.tokenizer = {tmp_path}/tok, " in warning
    assert not found(replace(two, nodes=1), run(tmp_path)).warnings
