"""A run starts from a Hugging Face directory as from the checkpoint that convert.py makes of it, bit for bit."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from megatron_ext.config import ModelConfig, ParallelConfig
from megatron_ext.errors import ConversionError
from megatron_ext.manifest import write_manifest
from megatron_ext.model_io.convert import convert
from megatron_ext.model_io.open import read_any_model
from megatron_ext.testing.pool import GlooPool, WorkerFailure
from tests.distributed.runs import Part, open_part, started_otherwise

LAYOUT = ParallelConfig(
    tensor_model_parallel_size=2,
    sequence_parallel=True,
    pipeline_model_parallel_size=2,
    expert_model_parallel_size=2,
    expert_tensor_parallel_size=1,
)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixture-of-Experts model as a Hugging Face directory, and as a checkpoint made of it."""
    directory = tmp_path_factory.mktemp("work")
    config = Qwen2MoeConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    Qwen2MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(directory / "hf")
    convert(directory / "hf", directory / "imported")
    return directory


def weights(part: Part) -> dict[str, torch.Tensor]:
    """What this rank holds of the model, by the place in it."""
    with open_part(part) as session:
        return {
            f"{shard.key} {shard.offset}": shard.data.detach().clone()
            for shard in session.checkpoints.tensors(only=["model"])
        }


@pytest.mark.parametrize("padding", [128, 8])
def test_each_rank_has_the_same_weights(work: Path, padding: int, tmp_path: Path, pool: GlooPool) -> None:
    model = read_any_model(work / "hf")
    starts = ("hf", "imported") if padding == 128 else ("hf",)
    held = []
    for start in starts:
        own = ModelConfig(**{**vars(model), "make_vocab_size_divisible_by": padding})
        part = Part(own, tmp_path / start, LAYOUT, checkpoint=(("initialize_from", str(work / start)),))
        held.append(pool.run(4, weights, started_otherwise(part)))
    for ranks in zip(*held, strict=True):
        first = ranks[0]
        assert all(first.keys() == other.keys() for other in ranks)
        assert [key for key in first for other in ranks if not first[key].equal(other[key])] == []
    if padding == 8:
        # 259 tokens in 264 rows, halves of which are on two ranks.
        table = torch.cat([held[0][rank][f"embedding.word_embeddings.weight ({132 * rank}, 0)"] for rank in range(2)])
        reference = Qwen2MoeForCausalLM.from_pretrained(work / "hf", dtype=torch.float32)
        assert table[:259].equal(reference.model.embed_tokens.weight.data)
        assert not table[259:].any()


def test_another_model_is_refused(work: Path, tmp_path: Path, pool: GlooPool) -> None:
    model = ModelConfig(**{**vars(read_any_model(work / "hf")), "moe_router_topk": 1, "num_layers": 2})
    part = Part(model, tmp_path / "run", checkpoint=(("initialize_from", str(work / "hf")),))
    with pytest.raises(WorkerFailure, match=r"hf holds another model:\n  model\.num_layers: 4 in the checkpoint, 2 in"):
        pool.run(1, weights, part)


def test_a_damaged_export_is_no_start(work: Path, tmp_path: Path, pool: GlooPool) -> None:
    shutil.copytree(work / "hf", tmp_path / "hf")
    write_manifest(tmp_path / "hf")
    weights_file = tmp_path / "hf" / "model.safetensors"
    content = bytearray(weights_file.read_bytes())
    content[-1] ^= 0x40
    weights_file.write_bytes(content)
    model = read_any_model(work / "hf")
    part = Part(model, tmp_path / "run", LAYOUT, checkpoint=(("initialize_from", str(tmp_path / "hf")),))
    with pytest.raises(WorkerFailure, match=r"hf is damaged"):
        pool.run(8, weights, part)
    with pytest.raises(ConversionError, match=r"hf is damaged"):
        convert(tmp_path / "hf", tmp_path / "imported")
