"""Checkpoints that a run does not continue, by name of what differs; and changes that it takes."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ext.checkpoint.find import require_checkpoint
from megatron_ext.checkpoint.run_file import read_run
from megatron_ext.checkpoint.streams import MegatronSink, MegatronSource
from megatron_ext.config import LoraConfig, LoraTarget, ParallelConfig, to_mapping
from megatron_ext.manifest import MANIFEST_FILE
from megatron_ext.testing.pool import GlooPool, WorkerFailure
from megatron_ext.testing.tiny import tiny_model
from tests.distributed.runs import (
    Part,
    open_part,
    train_and_save,
)
from tests.unit.model_io.drawn_adapters import write_drawn

DENSE, MOE = tiny_model(), tiny_model(moe=True)
ALONE = ParallelConfig(use_distributed_optimizer=False)


def test_a_checkpoint_of_other_data_is_not_continued(pool: GlooPool, tmp_path: Path) -> None:
    pool.run(1, train_and_save, Part(DENSE, tmp_path, ALONE), 1)
    with pytest.raises(WorkerFailure, match=r"train\.seed: 1234 in the checkpoint, 99 in this run"):
        pool.run(1, train_and_save, Part(DENSE, tmp_path, ALONE, seed=99), 2)


def test_training_goes_on_in_the_folder_of_converted_weights(pool: GlooPool, tmp_path: Path) -> None:
    pool.run(1, train_and_save, Part(DENSE, tmp_path / "run", ALONE), 1)
    source, run = MegatronSource(tmp_path / "run"), read_run(require_checkpoint(tmp_path / "run"))
    with MegatronSink(tmp_path / "converted", source.specs, run) as sink:
        for name in source.specs:
            sink.write(name, source.read(name))
    part = Part(DENSE, tmp_path / "converted", ALONE, seed=99)
    with pytest.raises(WorkerFailure, match=r"It holds no optimizer: .* or go on here without, checkpoint\.load_opt"):
        pool.run(1, train_and_save, part, 2)
    adapters = LoraConfig(targets=[LoraTarget(match=["q", "up"], rank=2)])
    write_drawn(tmp_path / "converted", tmp_path / "adapters", adapters)
    base = (("initialize_from", str(tmp_path / "converted")),)
    beside = replace(part, directory=tmp_path / "adapters", adapters=to_mapping(adapters), checkpoint=base)
    assert len(pool.run(1, train_and_save, beside, 2)[0]) == 2, "adapters from elsewhere start an optimizer afresh"
    part = replace(part, checkpoint=(("load_optimizer", False),))
    assert len(pool.run(1, train_and_save, part, 2)[0]) == 2


def test_overrides_that_change_the_function_make_another_model(pool: GlooPool, tmp_path: Path) -> None:
    pool.run(1, train_and_save, Part(MOE, tmp_path, ALONE), 1)
    harmless = replace(MOE, transformer_overrides={"deallocate_pipeline_outputs": True})
    pool.run(1, train_and_save, Part(harmless, tmp_path, ALONE), 2)
    other = replace(MOE, transformer_overrides={"fp32_residual_connection": True})
    with pytest.raises(WorkerFailure, match=r"model\.transformer_overrides: .* in the checkpoint, {'fp32_residual"):
        pool.run(1, train_and_save, Part(other, tmp_path, ALONE), 3)


def test_dropout_and_z_loss_may_change_and_the_learned_length_may_not(pool: GlooPool, tmp_path: Path) -> None:
    learned = tiny_model(position_embedding_type="learned_absolute")
    pool.run(1, train_and_save, Part(learned, tmp_path, ALONE), 1)
    changed = replace(learned, hidden_dropout=0.1, attention_dropout=0.1, output_z_loss_coeff=1e-3)
    pool.run(1, train_and_save, Part(changed, tmp_path, ALONE), 2)
    longer = replace(learned, max_position_embeddings=128)
    with pytest.raises(WorkerFailure, match=r"model\.max_position_embeddings: 64 in the checkpoint, 128 in this run"):
        pool.run(1, train_and_save, Part(longer, tmp_path, ALONE), 3)


def test_missing_tensors_are_named(pool: GlooPool, tmp_path: Path) -> None:
    pool.run(1, train_and_save, Part(DENSE, tmp_path / "whole", ALONE), 1)
    source = MegatronSource(tmp_path / "whole")
    specs = {name: spec for name, spec in source.specs.items() if "layers.2" not in name}
    with MegatronSink(tmp_path / "lacking", specs, {"model": to_mapping(DENSE)}) as sink:
        for name in specs:
            sink.write(name, source.read(name))
    part = Part(DENSE, tmp_path / "new", ALONE, checkpoint=(("initialize_from", str(tmp_path / "lacking")),))
    with pytest.raises(WorkerFailure, match=r"missing: decoder\.layers\.2\.mlp\.linear_fc1\.weight \[192, 64\]"):
        pool.run(1, open_and_forget, part)


def open_and_forget(part: Part) -> None:
    with open_part(part):
        pass


def test_a_damaged_file_is_named(pool: GlooPool, tmp_path: Path) -> None:
    part = Part(DENSE, tmp_path, ALONE)
    pool.run(1, train_and_save, part, 1)
    data = tmp_path / "iter_0000001" / "__0_0.distcp"
    with open(data, "r+b") as file:
        file.truncate(data.stat().st_size // 2)
    with pytest.raises(WorkerFailure, match=r"__0_0\.distcp: \d+ bytes instead of \d+"):
        pool.run(1, train_and_save, part, 2)
    (tmp_path / "iter_0000001" / MANIFEST_FILE).unlink()  # as in a checkpoint of an older version
    with pytest.raises(WorkerFailure, match=r"__0_0\.distcp ends inside"):
        pool.run(1, train_and_save, part, 2)
