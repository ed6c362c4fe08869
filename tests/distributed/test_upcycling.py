"""An upcycled checkpoint trains alike in every layout."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ext.config import ParallelConfig
from megatron_ext.conversion.checkpoint_model import read_model
from megatron_ext.testing.pool import GlooPool
from megatron_ext.testing.tiny import tiny_model
from megatron_ext.upcycling.options import UpcycleOptions
from megatron_ext.upcycling.run import upcycle
from megatron_ext.upcycling.shared_routed import SharedRouted
from megatron_ext.upcycling.upcycle import make_plan
from tests.distributed.runs import Part, train_and_save
from tests.unit.conversion.test_convert import write_checkpoint

TP = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)
LAYOUTS = {
    "TP2 SP": (2, TP),
    "EP2": (2, ParallelConfig(expert_model_parallel_size=2)),
    "TP2 SP EP2 ETP1": (2, replace(TP, expert_model_parallel_size=2, expert_tensor_parallel_size=1)),
    "PP2 EP2": (4, ParallelConfig(pipeline_model_parallel_size=2, expert_model_parallel_size=2)),
}


@pytest.fixture(scope="module")
def upcycled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("upcycled")
    source = write_checkpoint(folder / "dense", tiny_model())
    options = UpcycleOptions(
        sources=[str(source)],
        target=str(folder / "moe"),
        method=SharedRouted(granularity=2),
        num_experts=8,
        topk=4,
        shared_expert_size=32,
        logits=False,
    )
    upcycle(make_plan(options))
    return folder / "moe"


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_upcycled_model_trains_alike_in_every_layout(
    name: str, upcycled: Path, pool: GlooPool, tmp_path: Path
) -> None:
    model = read_model(upcycled)
    part = Part(model, tmp_path / "run", checkpoint=(("initialize_from", str(upcycled)),))
    (alone,) = pool.run(1, train_and_save, part, 2, False)
    processes, parallel = LAYOUTS[name]
    ranks = pool.run(processes, train_and_save, replace(part, parallel=parallel), 2, False)
    pairs = [(a, b) for steps in ranks for x, y in zip(steps, alone, strict=True) for a, b in zip(x, y, strict=True)]
    difference = max(abs(a - b) / abs(b) for a, b in pairs)
    print(f"{name}: largest relative difference of loss and gradient norm {difference:.1e}")
    # As in the parity grid: another layout adds in another order.
    assert difference < 1e-5
