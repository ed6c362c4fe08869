"""Checkpoints hold adapters alone, load in every layout, and only beside the base that they were trained with."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.canonical.adapters import LORA, adapter_tensors
from megatron_ext.canonical.catalogue import EMBEDDING
from megatron_ext.checkpoint.find import require_checkpoint
from megatron_ext.checkpoint.fingerprint import fingerprint_sum
from megatron_ext.checkpoint.shards import TensorShard
from megatron_ext.checkpoint.streams import MegatronSource
from megatron_ext.checkpoint.torch_dist import TorchDistReader
from megatron_ext.config import LoraConfig, LoraTarget, ParallelConfig, to_mapping
from megatron_ext.merging.lora import merge_lora, silent
from megatron_ext.merging.lora_options import MergeLoraOptions
from megatron_ext.model_io.compare import compare_weights
from megatron_ext.testing.pool import GlooPool, WorkerFailure
from megatron_ext.testing.tiny import tiny_model
from megatron_ext.training.verdict import Rollback, Take
from tests.distributed.runs import Part, load_and_save_to, open_part, started_otherwise, train_and_save

ALONE = ParallelConfig(use_distributed_optimizer=False)
EVERYTHING = ParallelConfig(
    tensor_model_parallel_size=2,
    sequence_parallel=True,
    pipeline_model_parallel_size=2,
    expert_model_parallel_size=2,
    expert_tensor_parallel_size=1,
)
MODEL = tiny_model(moe=True)
ADAPTERS = LoraConfig(targets=[LoraTarget(match=["*"], rank=4, alpha=8.0)])


@pytest.fixture(scope="module")
def base(pool: GlooPool, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Weights to train beside: those of a run of one step with this seed."""
    done: dict[int, Path] = {}

    def trained(seed: int) -> Path:
        if seed not in done:
            done[seed] = tmp_path_factory.mktemp("base")
            pool.run(1, train_and_save, Part(MODEL, done[seed], ALONE, seed=seed), 1)
        return done[seed]

    return trained


def beside(base: Path, directory: Path, parallel: ParallelConfig = ALONE, adapters: LoraConfig = ADAPTERS) -> Part:
    return Part(MODEL, directory, parallel, checkpoint=(("initialize_from", str(base)),), adapters=to_mapping(adapters))


def test_any_layout_continues_any_other(pool: GlooPool, base: Callable[[int], Path], tmp_path: Path) -> None:
    whole = pool.run(1, train_and_save, beside(base(1), tmp_path / "whole"), 4)[0]
    part = beside(base(1), tmp_path / "run", EVERYTHING)
    first = pool.run(4, train_and_save, part, 2)[0]
    stored = TorchDistReader(require_checkpoint(tmp_path / "run"))
    assert all(LORA in key for key in stored.tensors)
    weights = {key for key in stored.tensors if not key.startswith("optimizer.")}
    assert {f"optimizer.state.{of}.{key}" for of in ("param", "exp_avg", "exp_avg_sq") for key in weights} == {
        key for key in stored.tensors if key.startswith("optimizer.")
    }
    canonical = {name: spec.shape for name, spec in MegatronSource(tmp_path / "run").specs.items()}
    assert canonical == {name: tensor.shape for name, tensor in adapter_tensors(MODEL, ADAPTERS).items()}
    second = pool.run(1, train_and_save, replace(started_otherwise(part), parallel=ALONE), 4)[0]
    pairs = zip(itertools.chain(*first, *second), itertools.chain(*whole), strict=True)
    difference = max(abs(a - b) / abs(b) for a, b in pairs)
    print(f"largest relative difference {difference:.1e}")
    assert difference < 1e-5


def logits_of(part: Part) -> torch.Tensor:
    """What the model of a run computes where it goes on, or begins."""
    tokens = torch.arange(64).view(2, 32)
    with open_part(part) as session, torch.no_grad():
        (chunk,) = session.chunks
        logits: torch.Tensor = chunk.eval()(tokens, torch.arange(32).expand(2, -1), None)
        return logits


def test_merged_weights_compute_what_adapters_do(pool: GlooPool, base: Callable[[int], Path], tmp_path: Path) -> None:
    """From checkpoints of two layouts the same files."""
    spread = beside(base(1), tmp_path / "spread", EVERYTHING, replace(ADAPTERS, lr_ratio=16.0))
    pool.run(4, train_and_save, spread, 3)
    alone = replace(spread, parallel=ALONE)
    pool.run(1, load_and_save_to, alone, tmp_path / "alone")
    for name in ("spread", "alone"):
        options = MergeLoraOptions(adapters=str(tmp_path / name), target=str(tmp_path / f"{name} merged"))
        merge_lora(options, silent)
    assert not compare_weights(tmp_path / "spread merged", tmp_path / "alone merged").different
    adapted = pool.run(1, logits_of, alone)[0]
    from_merged = (("initialize_from", str(tmp_path / "spread merged")),)
    whole = pool.run(1, logits_of, Part(MODEL, tmp_path / "on", checkpoint=from_merged))[0]
    untouched = pool.run(1, logits_of, Part(MODEL, tmp_path / "on", checkpoint=spread.checkpoint))[0]
    scale = float(untouched.abs().max())
    difference, effect = float((adapted - whole).abs().max()) / scale, float((adapted - untouched).abs().max()) / scale
    print(f"logits differ by {difference:.1e} of the largest; adapters change them by {effect:.1e}")
    assert difference < 1e-5
    assert effect > 1e-2


def test_another_base_or_other_adapters_are_refused(
    pool: GlooPool, base: Callable[[int], Path], tmp_path: Path
) -> None:
    part = beside(base(1), tmp_path / "run")
    pool.run(1, train_and_save, part, 1)

    def refused(other: Part) -> str:
        with pytest.raises(WorkerFailure) as caught:
            pool.run(1, train_and_save, other, 2)
        return str(caught.value)

    assert "holds other weights" in refused(beside(base(2), tmp_path / "run"))
    louder = replace(ADAPTERS, targets=[LoraTarget(match=["*"], rank=4, alpha=16.0)])
    assert "rank 4, scale 2 in the checkpoint, rank 4, scale 4 in this run" in refused(
        beside(base(1), tmp_path / "run", adapters=louder)
    )
    fewer = replace(ADAPTERS, targets=[LoraTarget(match=["self_attention.*"], rank=4, alpha=8.0)])
    assert "rank 4, scale 2 in the checkpoint, none in this run" in refused(
        beside(base(1), tmp_path / "run", adapters=fewer)
    )
    from_adapters = (("initialize_from", str(tmp_path / "run")),)
    assert "holds adapters alone" in refused(Part(MODEL, tmp_path / "new", checkpoint=from_adapters))
    assert "adapters alone, and this run trains all weights" in refused(Part(MODEL, tmp_path / "run"))


def weights_after_going_back(part: Part) -> tuple[bool, bool]:
    """Change a bit of the base, go back, and look: whether the base, and all that is trained, is what it was."""
    with open_part(part) as session:
        base, trained = session.trainable.base_weights(), session.trainable.saved_weights()
        before = [[shard.data.clone() for shard in shards] for shards in (base, trained)]
        checkpoint = session.checkpoints.newest()
        assert checkpoint is not None
        session.judge = lambda _: Take()
        session.step(session.stream.next())
        assert all(torch.equal(shard.data, old) for shard, old in zip(base, before[0], strict=True)), "nothing moves it"
        base[0].data.view(torch.int32).flatten()[7] ^= 1 << 30
        session.judge = lambda _: Rollback("a bit has flipped", checkpoint, 4)
        session.step(session.stream.next())
        base_now, trained_now = (
            all(torch.equal(shard.data, old) for shard, old in zip(shards, olds, strict=True))
            for shards, olds in zip((base, trained), before, strict=True)
        )
        return base_now, trained_now


def test_going_back_heals_the_base_that_no_checkpoint_holds(
    pool: GlooPool, base: Callable[[int], Path], tmp_path: Path
) -> None:
    part = beside(base(1), tmp_path / "run")
    pool.run(1, train_and_save, part, 1)
    assert pool.run(1, weights_after_going_back, part) == [(True, True)]


def shards(whole: dict[str, torch.Tensor], parts: int) -> list[TensorShard]:
    return [
        TensorShard(key, tuple(tensor.shape), (start, 0), tensor[start : start + tensor.shape[0] // parts], True)
        for key, tensor in whole.items()
        for start in range(0, tensor.shape[0], tensor.shape[0] // parts)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_fingerprint_is_of_the_weights_alone(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {key: torch.randn(8, 6, generator=generator).to(dtype) for key in ("a", EMBEDDING)}
    first = fingerprint_sum(shards(weights, 1), 7) % 2**64
    assert fingerprint_sum(shards(weights, 4), 7) % 2**64 == first
    weights[EMBEDDING][7] += 1
    assert fingerprint_sum(shards(weights, 2), 7) % 2**64 == first, "vocabulary padding"
    filled = weights["a"].clone().index_fill_(0, torch.tensor([3]), 0.5)
    for changed in (weights["a"].flip(0), weights["a"].flip(1), filled):
        assert fingerprint_sum(shards({**weights, "a": changed}, 2), 7) % 2**64 != first
    swapped: dict[str, Any] = {"a": weights[EMBEDDING], "b": weights["a"]}
    assert fingerprint_sum(shards(swapped, 2), 7) % 2**64 != first
