"""Conversion and parallel training: any layout exports the same bytes, an imported model trains as it should."""

import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from megatron_ext.config import ModelConfig, ParallelConfig
from megatron_ext.model_io.checkpoint_model import read_model
from megatron_ext.model_io.convert import convert
from megatron_ext.testing.pool import GlooPool
from megatron_ext.testing.tiny import random_batch, tiny_model
from tests.distributed.runs import GLOBAL_BATCH, Part, load_and_save_to, started_otherwise, train_and_save

ALONE = ParallelConfig(use_distributed_optimizer=False)


@dataclass(frozen=True)
class GridCase:
    """Degrees of parallelism of one cell of the grid."""

    tp: int
    pp: int
    vpp: int | None
    ep: int = 1
    etp: int | None = None

    @property
    def processes(self) -> int:
        return self.pp * math.lcm(self.tp, self.ep * (self.etp or self.tp))

    @property
    def parallel(self) -> ParallelConfig:
        return ParallelConfig(
            tensor_model_parallel_size=self.tp,
            sequence_parallel=self.tp > 1,
            pipeline_model_parallel_size=self.pp,
            virtual_pipeline_model_parallel_size=self.vpp,
            expert_model_parallel_size=self.ep,
            expert_tensor_parallel_size=self.etp,
        )

    def __str__(self) -> str:
        degrees = {"TP": self.tp, "PP": self.pp, "VPP": self.vpp, "EP": self.ep, "ETP": self.etp}
        return " ".join(f"{name}{degree}" for name, degree in degrees.items() if degree not in (None, 1)) or "alone"


def grid(*, moe: bool) -> Iterator[GridCase]:
    """Every layout of TP, PP, VPP, EP and ETP in {1, 2}."""
    experts = [(1, None), (2, 1), (2, 2)] if moe else [(1, None)]
    for tp, (pp, vpp), (ep, etp) in itertools.product((1, 2), ((1, None), (2, None), (2, 2)), experts):
        yield GridCase(tp, pp, vpp, ep, etp)


MODELS = {
    "dense": tiny_model(),
    "tied": tiny_model(untie_embeddings_and_output_weights=False),
    "MoE": tiny_model(moe=True),
}
CELLS = [
    *(("dense", layout) for layout in grid(moe=False)),
    *(("tied", layout) for layout in (GridCase(2, 1, None), GridCase(1, 2, 2))),
    *(("MoE", layout) for layout in grid(moe=True)),
]


@pytest.fixture(scope="module")
def trained(pool: GlooPool, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Each model trained for one step on one process, so that no two of its tensors are alike, and its export."""
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            pool.run(1, train_and_save, Part(MODELS[name], made[name] / "run", ALONE), 1)
            convert(made[name] / "run", made[name] / "hf")
        return made[name]

    return of


@pytest.mark.parametrize(("name", "layout"), CELLS, ids=str)
def test_every_layout_exports_the_same_bytes(
    name: str, layout: GridCase, trained: Callable[[str], Path], pool: GlooPool, tmp_path: Path
) -> None:
    """The same weights, saved by the processes of a layout and exported by one process, are the same files."""
    whole = trained(name)
    part = replace(started_otherwise(Part(MODELS[name], whole / "run", ALONE)), parallel=layout.parallel)
    pool.run(layout.processes, load_and_save_to, part, tmp_path / "saved")
    assert len(list((tmp_path / "saved").rglob("*.distcp"))) == layout.processes
    convert(tmp_path / "saved", tmp_path / "hf", workers=2)
    assert (tmp_path / "hf/model.safetensors").read_bytes() == (whole / "hf/model.safetensors").read_bytes()
    ours, expected = (json.loads((place / "hf/config.json").read_text()) for place in (tmp_path, whole))
    assert ours.pop("initializer_range") != expected.pop("initializer_range"), "weights could look loaded by accident"
    assert ours == expected


# --- training through conversion ----------------------------------------------------------------------------


SIZES: dict[str, Any] = {
    "vocab_size": 250,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
}
QWEN2_MOE_SIZES = {
    "intermediate_size": 88,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "mlp_only_layers": [1],
}
HUGGING_FACE: dict[str, Callable[[], PreTrainedModel]] = {
    "Llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=88)),
    "Mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, intermediate_size=40, num_local_experts=5)),
    "Qwen2-MoE": lambda: Qwen2MoeForCausalLM(Qwen2MoeConfig(**SIZES, **QWEN2_MOE_SIZES)),
}


def transformers_losses(directory: Path, steps: int, lr: float = 1e-3) -> list[float]:
    """Losses of training the model in `directory` with transformers and torch's AdamW, as our runs train."""
    network = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).train()
    decayed = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8)
    losses = []
    for step in range(steps):
        (batch,) = random_batch(step, samples=GLOBAL_BATCH, micro_batch=GLOBAL_BATCH, dp_rank=0, dp_size=1)
        logits = network(batch.tokens).logits
        each = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none")
        loss = (each * batch.loss_mask.flatten()).sum() / batch.loss_mask.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_an_imported_model_trains_as_in_transformers(name: str, pool: GlooPool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    HUGGING_FACE[name]().save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "imported")
    # transformers adds no balance loss unless asked to.
    model: ModelConfig = replace(read_model(tmp_path / "imported"), moe_aux_loss_coeff=0.0)
    part = Part(model, tmp_path / "run", ALONE, checkpoint=(("initialize_from", str(tmp_path / "imported")),))
    (ours,) = pool.run(1, train_and_save, part, 3)
    theirs = transformers_losses(tmp_path / "hf", 3)
    difference = max(abs(loss - other) / other for (loss, _), other in zip(ours, theirs, strict=True))
    print(f"{name}: losses {[round(loss, 5) for loss in theirs]}, largest relative difference {difference:.1e}")
    untrained = transformers_losses(tmp_path / "hf", 3, lr=0.0)
    effect = min(abs(a - b) / b for a, b in zip(theirs[1:], untrained[1:], strict=True))
    assert effect > 1e-4, "training changes the losses by far more than what is compared here"
    # fp32 rounding of sums taken in another order, through three steps; measured 2e-7.
    assert difference < 2e-6
