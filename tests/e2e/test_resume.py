"""A run that is killed, stopped or moved to another layout goes on as if nothing had happened."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.checkpoint.find import checkpoint_name, find_checkpoint
from megatron_ext.checkpoint.state_file import read_state
from megatron_ext.config import load_run
from megatron_ext.data.prepare.preprocess import preprocess
from megatron_ext.monitoring.metrics_file import read_history, read_metrics
from megatron_ext.planning.assumptions import GPUS
from megatron_ext.planning.plan_run import planned_run, write_planned
from megatron_ext.planning.search import search
from tests.support.commands import TOOLS, train
from tests.support.waiting import HANGS, Holds, ended_at_last, ranks_of, wait_until
from tests.support.workspace import prepare_data, reported_losses, run_mapping, write_run

LAYOUT = [
    "parallel.tensor_model_parallel_size=2",
    "parallel.sequence_parallel=true",
    "parallel.expert_model_parallel_size=2",
    "parallel.expert_tensor_parallel_size=1",
]
STEPS = 30


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("work")
    prepare_data(directory)
    mapping = run_mapping(directory, moe=True)
    mapping["train"] |= {"train_iters": STEPS, "eval_interval": 10, "eval_iters": 2}
    mapping["checkpoint"] |= {"save_interval": 5}
    mapping["evaluation"] = {"on_checkpoint": 'echo "{\\"step\\": $STEP}"'}
    mapping["data"]["train"].append({"path": str(directory / "data" / "test"), "weight": 0.2, "id": "rare"})
    write_run(directory / "run.yaml", mapping)
    return directory


def reports(directory: Path) -> list[tuple[Any, ...]]:
    """Every figure of training that does not depend on the clock."""
    records = read_metrics(directory / "metrics.jsonl")
    names = (
        "iteration",
        "loss",
        "validation_loss",
        "learning_rate",
        "grad_norm",
        "consumed_samples",
        "sources",
        "moe",
    )
    return [tuple(record.get(name) for name in names) for record in records]


def planned(run: Path, processes: int, target: Path) -> Path:
    """`run` in the layout of the planner's table that splits the experts most, as tools/plan.py writes it."""
    found = search(load_run(run), processes, GPUS["h100"], best=100)
    places = [place for place, one in enumerate(found.chosen, 1) if one.candidate.layout.ep == processes]
    write_planned(planned_run(found, places[0], None), str(target))
    return target


@pytest.fixture(scope="module")
def uninterrupted(work: Path) -> Path:
    directory = work / "uninterrupted"
    process = train(4, work / "run.yaml", *LAYOUT, f"checkpoint.directory={directory}")
    assert process.returncode == 0, process.stderr
    return directory


def start(processes: int, errors: Path, holds: Holds, *arguments: str | Path) -> subprocess.Popen[bytes]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *launcher, str(TOOLS / "train.py"), *map(str, arguments)]
    with errors.open("w") as file:
        environment = {**os.environ, **holds.environment}
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file, env=environment)


def saved_step(directory: Path) -> int:
    """The step of the newest checkpoint, 0 where there is none."""
    checkpoint = find_checkpoint(directory) if directory.is_dir() else None
    return read_state(checkpoint).iteration if checkpoint is not None else 0


def kill_a_rank_after(
    launcher: subprocess.Popen[bytes], errors: Path, directory: Path, *, rank: int, step: int
) -> None:
    """Kill -9 `rank` once `step` was reported and this start has saved, and wait until the launcher has given up."""
    metrics, saved_before = directory / "metrics.jsonl", saved_step(directory)

    def has_come_far() -> bool:
        records = read_metrics(metrics) if metrics.is_file() else []
        return bool(records) and records[-1]["iteration"] >= step and saved_step(directory) > saved_before

    with ended_at_last(launcher):
        wait_until(has_come_far, errors.read_text, launcher)
        ranks_of(launcher)[rank].kill()
        assert launcher.wait(HANGS) != 0, errors.read_text()


def test_kill_9_and_the_same_command_give_the_uninterrupted_run_bit_for_bit(work: Path, uninterrupted: Path) -> None:
    directory = work / "killed"
    arguments = [work / "run.yaml", *LAYOUT, f"checkpoint.directory={directory}"]
    saved = 0
    # Each start waits for its kill two saves later at the latest, which no fast machine can be beyond.
    for rank, step, last in ((0, 7, 15), (3, 12, 25)):
        errors = work / f"killed_at_{step}.txt"
        holds = Holds(work / f"holds_{step}", f"{checkpoint_name(last)}.partial")
        kill_a_rank_after(start(4, errors, holds, *arguments), errors, directory, rank=rank, step=step)
        stopped_at = read_metrics(directory / "metrics.jsonl")[-1]["iteration"]
        before, saved = saved, saved_step(directory)
        assert before < saved < STEPS, "it was not killed in the middle"
        print(f"rank {rank} killed at step {stopped_at}, goes on from step {saved}")
    process = train(4, *arguments)
    assert process.returncode == 0, process.stderr
    assert f"at step {saved}" in process.stderr
    assert reports(directory) == reports(uninterrupted)
    # Each checkpoint is evaluated, and reported once.
    evaluated = [event for event in read_history(directory / "metrics.jsonl").events if event["event"] == "evaluation"]
    assert sorted(event["results"]["step"] for event in evaluated) == list(range(5, STEPS + 1, 5))


@pytest.mark.parametrize(
    ("processes", "layout"),
    [
        (1, ["parallel.use_distributed_optimizer=false"]),
        (4, ["train.micro_batch_size=1"]),
    ],
    ids=["one process", "EP4 DP4 as planned, other micro-batch"],
)
def test_another_layout_continues_the_curve_and_the_data(
    processes: int, layout: list[str], work: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    first = train(4, work / "run.yaml", *LAYOUT, f"checkpoint.directory={directory}", "train.stop_at_iteration=7")
    assert first.returncode == 0, first.stderr
    run = planned(work / "run.yaml", processes, tmp_path / "planned.yaml") if processes == 4 else work / "run.yaml"
    second = train(processes, run, *layout, f"checkpoint.directory={directory}", "train.stop_at_iteration=20")
    assert second.returncode == 0, second.stderr
    pairs = zip(reported_losses(directory), reported_losses(uninterrupted)[:20], strict=True)
    difference = max(abs(a - b) / b for a, b in pairs)
    print(f"moved at step 7: largest relative difference of the loss until step 20 {difference:.1e}")
    # Rounding as in the parity grid; over other micro-batches the balance loss, a mean over them, is another.
    assert difference < (1e-3 if "train.micro_batch_size=1" in layout else 1e-5)


def test_a_finished_run_does_nothing(work: Path, uninterrupted: Path) -> None:
    before = reports(uninterrupted)
    process = train(4, work / "run.yaml", *LAYOUT, f"checkpoint.directory={uninterrupted}")
    assert process.returncode == 0
    assert f"nothing to do: {STEPS} of {STEPS} steps are done" in process.stderr
    assert reports(uninterrupted) == before


def test_bf16_with_recompute_and_overlap_follows_fp32(work: Path, uninterrupted: Path) -> None:
    options = [
        "precision.kind=bf16",
        "recompute.granularity=full",
        "parallel.overlap_grad_reduce=true",
        "parallel.overlap_param_gather=true",
    ]
    process = train(4, work / "run.yaml", *LAYOUT, *options, f"checkpoint.directory={work / 'bf16'}")
    assert process.returncode == 0, process.stderr
    pairs = zip(reported_losses(work / "bf16"), reported_losses(uninterrupted), strict=True)
    difference = max(abs(a - b) / b for a, b in pairs)
    print(f"bf16 against fp32: largest relative difference of the loss {difference:.1e}")
    # bf16 rounds to 4e-3; the loss is a mean over 512 tokens, so most of it averages out.
    assert difference < 4e-3


def test_a_blend_goes_on_with_a_smaller_batch(work: Path) -> None:
    directory = work / "smaller batch"
    blend = f"data.train=[{{path: {work}/data/train, weight: 0.7}}, {{path: {work}/data/validation, weight: 0.3}}]"
    options = (work / "run.yaml", blend, f"checkpoint.directory={directory}", "train.train_iters=6")
    options += ("schedule.warmup_iters=1", "train.eval_interval=null")
    assert train(1, *options, "train.global_batch_size=16", "train.stop_at_iteration=4").returncode == 0
    process = train(1, *options, "train.global_batch_size=4")
    assert process.returncode == 0, process.stderr
    assert [r["consumed_samples"] for r in read_metrics(directory / "metrics.jsonl")] == [16, 32, 48, 64, 68, 72]
    process = train(1, *options, "train.train_iters=8")
    assert process.returncode == 2
    assert "it decays to the end of what it covers, which was 6 steps in the checkpoint and is 8" in process.stderr
    options += ("schedule.decay_iters=6",)  # the way out that it names
    process = train(1, *options, "data.sequence_length=32", "train.train_iters=8")
    assert process.returncode == 2
    assert "data.sequence_length: 64 in the checkpoint, 32 in this run" in process.stderr
    process = train(1, *options, "data.reset_attention_mask=true", "train.train_iters=8")
    assert process.returncode == 2
    assert "data.reset_attention_mask: False in the checkpoint, True in this run" in process.stderr
    # The same data in another place is the same data; other data in the same place is not.
    shutil.copytree(work / "data", work / "moved")
    moved = (*options[:1], blend.replace("/data/", "/moved/"), *options[2:], "train.global_batch_size=4")
    process = train(1, *moved, "train.train_iters=7")
    assert process.returncode == 0, process.stderr
    shutil.rmtree(work / "moved")
    preprocess([work / "corpus.jsonl"], work / "tokenizer", work / "moved", split=(0.7, 0.2, 0.1))
    process = train(1, *moved, "train.train_iters=8")
    assert process.returncode == 2
    assert "what stands there is not the data of the checkpoint" in process.stderr
