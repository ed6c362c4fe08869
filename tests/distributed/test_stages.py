"""A run whose stages have other lengths, batches, rotary bases and learning rates trains the same in every layout."""

from pathlib import Path
from typing import Any

import pytest

from megatron_ext.checkpoint.find import require_checkpoint
from megatron_ext.checkpoint.run_file import read_run
from megatron_ext.checkpoint.streams import MegatronSource
from megatron_ext.config import load_config
from megatron_ext.config.data import DataConfig
from megatron_ext.model_io.checkpoint_model import read_model
from megatron_ext.monitoring.metrics_file import read_metrics
from megatron_ext.testing.pool import GlooPool, WorkerFailure
from tests.robustness.runs import train_here
from tests.support.workspace import prepare_data, run_mapping, write_run

STAGES: list[dict[str, Any]] = [
    {"name": "short", "mix": {"main": 0.6, "small": 0.4}, "samples": 24, "sequence_length": 32},
    {"name": "long", "mix": {"main": 1}, "steps": 3, "sequence_length": 128, "global_batch_size": 4}
    | {"micro_batch_size": 1, "rotary_base": 50000.0, "lr_scale": 0.5, "transition_tokens": 1024},
    {"name": "anneal", "mix": {"main": 0.5, "small": 0.5}, "steps": 3, "rotary_base": 50000.0},
]
"""With the ramp: 2 steps of 4 x 32 tokens, 2 of 8 x 32, 3 of 4 x 128, 3 of 8 x 64."""
TOKENS = [128, 256, 512, 768, 1280, 1792, 2304, 2816, 3328, 3840]
LAST = {4: "short", 7: "long", 10: "anneal"}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("stages")
    prepare_data(directory)
    mapping = run_mapping(directory, moe=True)
    mapping["train"] = {"global_batch_size": 8, "micro_batch_size": 2, "eval_interval": 100, "eval_iters": 1}
    mapping["train"]["batch_size_ramp"] = [{"global_batch_size": 4, "steps": 2}]
    mapping["schedule"] = {"kind": "wsd", "warmup_tokens": 512, "decay": {"stage": "anneal"}, "decay_style": "linear"}
    data = mapping["data"]
    sources = {"main": {"path": data["train"][0]["path"]}, "small": {"path": data["validation"][0]["path"]}}
    kept = {key: data[key] for key in ("sequence_length", "tokenizer", "validation")}
    mapping["data"] = {**kept, "sources": sources, "stages": STAGES}
    write_run(directory / "run.yaml", mapping)
    return directory


def train(pool: GlooPool, processes: int, work: Path, directory: Path, *overrides: str) -> None:
    pool.run(processes, train_here, work / "run.yaml", [f"checkpoint.directory={directory}", *overrides])


@pytest.fixture(scope="module")
def straight(pool: GlooPool, work: Path) -> Path:
    train(pool, 1, work, work / "straight")
    return work / "straight"


def reports(directory: Path) -> list[dict[str, Any]]:
    names = ("iteration", "loss", "grad_norm", "learning_rate", "consumed_tokens", "validation_loss", "stage", "moe")
    return [{name: record.get(name) for name in names} for record in read_metrics(directory / "metrics.jsonl")]


def test_tokens_rates_and_validations_are_those_of_the_plan(straight: Path) -> None:
    steps = [record for record in reports(straight) if record["loss"] is not None]
    assert [record["consumed_tokens"] for record in steps] == TOKENS
    # Warmed up by 512 tokens, half of it over 1,024 tokens from 768 on, and to zero over the last 1,536.
    peaks = [0.25, 0.5, 1, 1, 0.75, 0.5, 0.5, 2 / 3, 1 / 3, 0]
    assert [record["learning_rate"] for record in steps] == pytest.approx([1e-3 * rate for rate in peaks])
    validated = [record["iteration"] for record in reports(straight) if record["validation_loss"] is not None]
    assert validated == list(LAST)


@pytest.mark.parametrize(
    "layout",
    [
        ["tensor_model_parallel_size=2", "sequence_parallel=true", "pipeline_model_parallel_size=2"],
        ["context_parallel_size=2", "expert_model_parallel_size=2"],
    ],
    ids=["TP2 SP PP2", "CP2 DP2 EP2"],
)
def test_every_stage_trains_what_one_process_trains(
    layout: list[str], pool: GlooPool, work: Path, straight: Path, tmp_path: Path
) -> None:
    train(pool, 4, work, tmp_path / "run", *(f"parallel.{option}" for option in layout))
    for here, there in zip(reports(tmp_path / "run"), reports(straight), strict=True):
        assert here["consumed_tokens"] == there["consumed_tokens"]
        for name in ("loss", "grad_norm", "validation_loss"):
            assert (here[name] is None) == (there[name] is None)
            assert here[name] is None or here[name] == pytest.approx(there[name], rel=1e-5)


def test_resumed_in_each_stage_it_is_the_same_bit_for_bit(
    pool: GlooPool, work: Path, straight: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    bases = {1: 10000.0, 4: 10000.0, 6: 50000.0, 9: 50000.0}
    for stop, base in bases.items():
        train(pool, 1, work, directory, f"train.stop_at_iteration={stop}", "train.eval_interval=100")
        assert read_model(directory).rotary_base == base  # as it was trained last
    train(pool, 1, work, directory)
    # A job that is stopped within a stage validates before it ends.
    among = [record for record in reports(directory) if record["loss"] is not None or record["iteration"] in LAST]
    assert among == reports(straight)
    weights, others = (MegatronSource(require_checkpoint(place)) for place in (directory, straight))
    assert all((weights.read(name) == others.read(name)).all() for name in others.specs)
    # The record means the same stages, though the model is that of the last.
    saved = read_run(require_checkpoint(directory))
    data = load_config(DataConfig, saved["data"], source="saved")
    assert [stage.rotary_base for stage in data.stages] == [10000.0, 50000.0, 50000.0]
    assert saved["model"]["rotary_base"] == 50000.0


def test_the_base_of_the_stage_that_was_trained_is_the_models(pool: GlooPool, work: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    train(pool, 1, work, directory, "train.stop_at_iteration=3")
    with pytest.raises(WorkerFailure, match=r"rotary_base: 10000\.0 in the checkpoint, 20000\.0 in this run"):
        train(pool, 1, work, directory, "model.rotary_base=20000.0")
