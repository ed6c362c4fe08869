"""What of a run was changed since its checkpoint, key by key."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.checkpoint.run_file import write_run
from megatron_ext.checkpoint.state_file import BASE_KEY, UNTRAINED, write_scalars
from megatron_ext.config import LoraConfig, LoraTarget, to_mapping
from megatron_ext.errors import CheckpointError
from megatron_ext.training.same_run import (
    changed_keys,
    check_same_adapters,
    check_same_data,
    check_same_task,
    levers,
    rereads,
)
from tests.support.minimal_run import load, mapping


def changes(tmp_path: Path, saved: dict[str, Any], *overrides: str) -> list[str]:
    write_run(tmp_path, saved)
    return changed_keys(load(mapping(), *overrides), tmp_path)


def test_every_changed_key_is_told_with_both_values(tmp_path: Path) -> None:
    saved = to_mapping(load(mapping(schedule={"kind": "wsd", "wsd_decay_iters": 5})))
    assert changes(tmp_path, saved, "optimizer.lr=2e-3", "data.train=[{path: a, weight: 2.0}, {path: b}]") == [
        "optimizer.lr: 0.001 -> 0.002",
        "schedule.kind: 'wsd' -> 'cosine'",
        "data.train.0.weight: 1.0 -> 2.0",
        "data.train.1.path: nothing -> 'b'",
        "data.train.1.weight: nothing -> 1.0",
        "schedule.wsd_decay_iters: 5 -> nothing",
        "schedule.decay_style: 'minus_sqrt' -> nothing",
    ]


def test_keys_that_are_newer_than_the_checkpoint_have_their_defaults(tmp_path: Path) -> None:
    saved = to_mapping(load(mapping()))
    del saved["data"]["reset_position_ids"], saved["checkpoint"]["load_optimizer"]
    assert changes(tmp_path, saved, "train.seed=5") == ["train.seed: 1234 -> 5"]


def test_what_changes_bytes_and_not_what_is_computed_is_no_lever(tmp_path: Path) -> None:
    precision = {"kind": "fp8", "keep_fp8_weights": True}
    run = load(mapping(precision=precision))
    write_run(tmp_path, to_mapping(run))
    now = replace(
        run,
        precision=replace(run.precision, keep_fp8_weights=False),
        recompute=replace(run.recompute, logits=True),
        optimizer=replace(run.optimizer, moments_on_host=True, exp_avg_dtype="bf16"),
    )
    assert levers(now, tmp_path) == [("optimizer.exp_avg_dtype", "'fp32'", "'bf16'")]


def test_the_beta_of_preferences_may_change_as_a_learning_rate_may_but_not_their_loss(tmp_path: Path) -> None:
    """Such a change is told at the start, and is a lever in the guard's audit."""
    task = {"kind": "preference", "loss": "robust", "beta": 0.1, "label_smoothing": 0.1}
    data, checkpoint = {"cache_dir": None}, {"initialize_from": "m"}
    run = load(mapping(task=task, data=data, checkpoint=checkpoint))
    write_run(tmp_path, to_mapping(run))
    now = replace(run, task=replace(run.task, beta=0.2, label_smoothing=0.05))
    check_same_task(now.task, tmp_path, has_adapters=False)
    changed = [("task.beta", "0.1", "0.2"), ("task.label_smoothing", "0.1", "0.05")]
    assert changed_keys(now, tmp_path) == [f"{key}: {old} -> {new}" for key, old, new in changed]
    assert levers(now, tmp_path) == changed
    with pytest.raises(CheckpointError, match=r"task\.loss: 'robust' in the checkpoint, 'sigmoid' in this run"):
        check_same_task(replace(run.task, loss="sigmoid"), tmp_path, has_adapters=False)


def test_a_default_that_is_written_out_is_the_same_task(tmp_path: Path) -> None:
    data, checkpoint = {"cache_dir": None}, {"initialize_from": "m"}
    run = load(mapping(task={"kind": "preference"}, data=data, checkpoint=checkpoint))
    saved = to_mapping(run)
    del saved["task"]["reference"], saved["task"]["loss"]  # as in a checkpoint that is older than these keys
    write_run(tmp_path, saved)
    check_same_task(replace(run.task, log_probs="sum", reference="file"), tmp_path, has_adapters=False)
    with pytest.raises(CheckpointError, match=r"task\.reference: 'file' in the checkpoint, 'none' in this run"):
        check_same_task(replace(run.task, reference="none"), tmp_path, has_adapters=False)
    # What the same empty key means depends on adapters.
    with pytest.raises(CheckpointError, match=r"task\.reference: 'file' in the checkpoint, 'adapters_off' in this run"):
        check_same_task(run.task, tmp_path, has_adapters=True)
    simpo = replace(run.task, loss="simpo", gamma=0.5)
    write_run(tmp_path, to_mapping(replace(run, task=simpo)))
    check_same_task(replace(simpo, log_probs="mean", reference="none"), tmp_path, has_adapters=False)


def test_other_adapters_or_none_are_told_by_what_they_are_and_not_by_their_tensors(tmp_path: Path) -> None:
    model, adapters = load(mapping()).model, LoraConfig(targets=[LoraTarget(match=["q", "v"])])

    def said(then: LoraConfig | None, now: LoraConfig | None) -> str:
        base = {} if then is None else {BASE_KEY: {"path": "m", "fingerprint": "f", "adapters": to_mapping(then)}}
        write_scalars(tmp_path, {**UNTRAINED, **base})
        with pytest.raises(CheckpointError) as error:
            check_same_adapters(model, now, tmp_path)
        return str(error.value)

    assert "holds a whole model, and this run trains adapters\nSet them back, or start a new run" in said(
        None, adapters
    )
    assert "holds adapters alone, and this run trains all weights" in said(adapters, None)
    other = LoraConfig(targets=[LoraTarget(match=["q", "v"], rank=8)])
    lines = said(adapters, other).splitlines()
    assert len(lines) == 3
    assert "rank 16, scale 2 in the checkpoint, rank 8, scale 4 in this run" in lines[1]
    dropped = LoraConfig(targets=[LoraTarget(match=["q", "v"], dropout=0.1)], lr_ratio=4)
    check_same_adapters(model, dropped, tmp_path)


def test_the_length_of_stages_is_no_key_of_its_own(tmp_path: Path) -> None:
    staged = {"train": [], "cache_dir": None, "sources": {"a": {"path": "a"}}}
    longer = {**staged, "stages": [{"name": "all", "mix": {"a": 1}, "steps": 9}]}
    saved = to_mapping(load(mapping(data={**staged, "stages": [{"name": "all", "mix": {"a": 1}, "steps": 5}]})))
    saved["train"]["train_iters"] = 5
    write_run(tmp_path, saved)
    now = load(mapping(data=longer, train={"train_iters": 9}))
    assert changed_keys(now, tmp_path) == ["data.stages.0.steps: 5 -> 9"]


def test_samples_are_read_again_from_sources_of_stages_too_but_not_from_packs(tmp_path: Path) -> None:
    staged = {"train": [], "cache_dir": None, "sources": {"a": {"path": "a"}}}
    staged["stages"] = [{"name": "all", "mix": {"a": 1}, "steps": 5}]
    run = load(mapping(data=staged, train={"train_iters": 0}))
    saved = to_mapping(run)
    said = rereads(run.data, run.train, tmp_path, [], saved)
    assert said is not None
    assert "would read the same samples" in said
    assert rereads(run.data, replace(run.train, seed=5), tmp_path, [], saved) is None
    saved["data"]["pack_documents"] = True
    assert rereads(run.data, run.train, tmp_path, [], saved) is None


def test_a_checkpoint_of_weights_alone_says_nothing_of_training(tmp_path: Path) -> None:
    assert changes(tmp_path, {"model": mapping()["model"]}) == []


@pytest.mark.parametrize(
    ("saved", "now", "same"),
    [
        ([1, 1], [0.5, 0.5], True),
        ([None, 3], [0.25, 0.75], True),
        ([7], [1], True),
        ([1, 3], [1, 2], False),
        ([1, 3], [1], False),
    ],
)
def test_weights_that_make_the_same_shares_are_the_same_data(
    saved: list[float | None], now: list[float], same: bool, tmp_path: Path
) -> None:
    sources = [{"path": "a"} if weight is None else {"path": "a", "weight": weight} for weight in saved]
    content = to_mapping(load(mapping()))
    content["data"]["train"] = sources
    write_run(tmp_path, content)
    run = load(mapping(), f"data.train=[{', '.join(f'{{path: a, weight: {weight}}}' for weight in now)}]")
    if same:
        check_same_data(run.data, run.train, tmp_path)
    else:
        with pytest.raises(CheckpointError, match=r"weights of data\.train: "):
            check_same_data(run.data, run.train, tmp_path)
