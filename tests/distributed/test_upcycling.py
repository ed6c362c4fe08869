"""An upcycled checkpoint trains alike in every layout."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.config import ParallelConfig
from megatron_ext.model_io.checkpoint_model import read_model
from megatron_ext.testing.pool import GlooPool
from megatron_ext.testing.tiny import tiny_model
from megatron_ext.upcycling.methods.copy import Copy
from megatron_ext.upcycling.methods.drop import Drop
from megatron_ext.upcycling.methods.fine_grained import FineGrained
from megatron_ext.upcycling.methods.mix import Mix
from megatron_ext.upcycling.methods.noise import Noise
from megatron_ext.upcycling.methods.qwen import Shuffle
from megatron_ext.upcycling.methods.shared_routed import SharedRouted
from megatron_ext.upcycling.options import UpcycleOptions
from megatron_ext.upcycling.plan import make_plan
from megatron_ext.upcycling.run import upcycle
from tests.distributed.runs import Part, train_and_save
from tests.support.checkpoints import write_checkpoint

TP = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
LAYOUTS = {
    "TP2 SP": (2, TP),
    "EP2": (2, ParallelConfig(expert_model_parallel_size=2)),
    "TP2 SP EP2 ETP1": (2, replace(TP, expert_model_parallel_size=2, expert_tensor_parallel_size=1)),
    "PP2 EP2": (4, ParallelConfig(pipeline_model_parallel_size=2, expert_model_parallel_size=2)),
}


METHODS: dict[str, dict[str, Any]] = {
    "shared and routed": {"method": SharedRouted(granularity=2), "topk": 4, "shared_expert_size": 32},
    "copy": {"method": Copy(), "shared_expert_size": 40},
    "fine-grained": {"method": FineGrained(granularity=2), "topk": 4},
    "drop": {"method": Drop()},
    "noise": {"method": Noise()},
    "qwen": {"method": Shuffle(), "expert_size": 48},
    "mix": {"method": Mix()},
}
ALL = "TP2 SP EP2 ETP1"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("dense")
    return [str(write_checkpoint(folder / str(seed), tiny_model(), seed=seed)) for seed in range(2)]


@pytest.mark.parametrize(
    ("method", "layout"),
    [("shared and routed", layout) for layout in LAYOUTS] + [(m, ALL) for m in METHODS if m != "shared and routed"],
)
def test_an_upcycled_model_trains_alike_in_every_layout(
    method: str, layout: str, dense: list[str], pool: GlooPool, tmp_path: Path
) -> None:
    upcycled, sources = tmp_path / "moe", dense if method == "mix" else dense[:1]
    settings = {"num_experts": 8, "logits": False, **METHODS[method]}
    upcycle(make_plan(UpcycleOptions(sources=sources, target=str(upcycled), **settings)))
    # As the training configuration beside it has it. Without a balance loss a copy's router has a gradient of nothing
    # but rounding, since all experts compute the same, and Adam makes whole steps of that.
    model = replace(read_model(upcycled), moe_aux_loss_coeff=1e-2)
    part = Part(model, tmp_path / "run", checkpoint=(("initialize_from", str(upcycled)),))
    (alone,) = pool.run(1, train_and_save, part, 2, False)
    processes, parallel = LAYOUTS[layout]
    ranks = pool.run(processes, train_and_save, replace(part, parallel=parallel), 2, False)
    pairs = [(a, b) for steps in ranks for x, y in zip(steps, alone, strict=True) for a, b in zip(x, y, strict=True)]
    difference = max(abs(a - b) / abs(b) for a, b in pairs)
    print(f"{method}, {layout}: largest relative difference of loss and gradient norm {difference:.1e}")
    # As in the parity grid: another layout adds in another order.
    assert difference < 1e-5
