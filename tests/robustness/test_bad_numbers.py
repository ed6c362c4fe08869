"""NaN and infinity never reach a checkpoint, a batch without a label says so, and there is a way past a bad one."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_ext.checkpoint.find import find_checkpoint
from megatron_ext.data.stream.batches import MicroBatch
from megatron_ext.errors import CheckpointError, TrainingError
from megatron_ext.testing.pool import GlooPool
from megatron_ext.testing.tiny import SOURCES, random_batch, tiny_model
from tests.distributed.runs import GLOBAL_BATCH, Part, open_part, train_steps
from tests.robustness.runs import train_here


def save_and_then_poison(part: Part) -> str:
    """Save three steps, poison a weight as a bad update would, and save again."""
    with open_part(part) as session:
        for step in (1, 2, 3):
            train_steps(session, step)
            session.save()
        train_steps(session, 4)
        next(session.chunks[-1].parameters()).data.view(-1)[0] = math.inf
        with pytest.raises(CheckpointError) as refusal:
            session.save()
    return str(refusal.value)


def test_weights_are_finite_before_they_are_published_and_two_are_kept(pool: GlooPool, tmp_path: Path) -> None:
    part = Part(tiny_model(), tmp_path, checkpoint=(("keep_last", 1),))
    for error in pool.run(2, save_and_then_poison, part):
        assert "the checkpoint was not saved" in error
        assert "hold NaN or infinity, such as embedding.word_embeddings.weight: the run has diverged" in error
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000002", "iter_0000003"]
    assert find_checkpoint(tmp_path) == tmp_path / "iter_0000003"


def masked_batch() -> list[MicroBatch]:
    batch = random_batch(0, samples=GLOBAL_BATCH, micro_batch=1, dp_rank=dist.get_rank(), dp_size=dist.get_world_size())
    return [dataclasses.replace(micro, loss_mask=micro.loss_mask * 0) for micro in batch]


def meet_masked_batches(part: Part) -> tuple[str, float, float, float]:
    with open_part(part) as session:
        with pytest.raises(TrainingError) as refusal:
            session.step(masked_batch())
        batch = random_batch(
            1, samples=GLOBAL_BATCH, micro_batch=1, dp_rank=dist.get_rank(), dp_size=dist.get_world_size()
        )
        alone = session.validate(iter([batch]))[0]["loss"]
        losses, sources = session.validate(iter([batch, masked_batch()]), SOURCES)
        beside = losses["loss"]
        assert sum(mean * units for mean, units in sources if mean is not None) == pytest.approx(
            alone * sum(units for _, units in sources), rel=1e-6
        )
        nothing, sources = session.validate(iter([masked_batch()]), SOURCES)
        assert sources == [(None, 0)] * SOURCES
        return str(refusal.value), alone, beside, nothing["loss"]


def test_a_batch_without_labels_says_so(pool: GlooPool, tmp_path: Path) -> None:
    for error, alone, beside, nothing in pool.run(2, meet_masked_batches, Part(tiny_model(), tmp_path)):
        assert error.startswith("step 1: no label of the global batch counts, so there is no loss")
        assert "train.skip_steps" in error
        assert alone == beside
        assert math.isnan(nothing)


def test_steps_are_passed_over_with_their_samples(work: Path, pool: GlooPool) -> None:
    taken = {}
    for name, skips in (("all", "[]"), ("skipped", "[[2, 3], [6, 6]]")):
        overrides = [f"checkpoint.directory={work / name}", f"train.skip_steps={skips}"]
        pool.run(2, train_here, work / "run.yaml", [*overrides, "train.stop_at_iteration=4"])
        pool.run(2, train_here, work / "run.yaml", overrides)
        lines = (work / name / "metrics.jsonl").read_text().splitlines()
        taken[name] = [json.loads(line) for line in lines]
    steps = [(r["iteration"], r["consumed_samples"]) for r in taken["skipped"] if "loss" in r]
    assert steps == [(1, 8), (4, 32), (5, 40)]
    skips = [(r["iteration"], r["first_sample"], r["last_sample"]) for r in taken["skipped"] if "last_sample" in r]
    assert skips == [(2, 8, 15), (3, 16, 23), (6, 40, 47)]
    first, rates = ([[r[key] for r in taken[n] if "loss" in r] for n in taken] for key in ("loss", "learning_rate"))
    assert first[0][0] == first[1][0]
    assert rates[1] == [rates[0][n] for n in (0, 3, 4)]
