"""megatron-core's flex dispatcher with our router and experts: what one process trains, whatever library sends."""

from dataclasses import replace
from typing import Any

import pytest

from megatron_ext.proving.parity import Cell, Trajectory, compare, run_cell, run_layout
from megatron_ext.testing.pool import GlooPool
from megatron_ext.testing.tiny import tiny_model
from tests.distributed.layouts import TOLERANCE, GridCase, layout
from tests.support.flex_messages import flex_messages

ALONE: dict[str, Any] = {
    "tensor_model_parallel_size": 1,
    "sequence_parallel": False,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": None,
    "use_distributed_optimizer": False,
}
CAPACITY: dict[str, Any] = {"moe_expert_capacity_factor": 0.8}
CASES = [
    ("deepep", layout("EP2 DP4", 4, ep=2), {}),
    ("hybridep", layout("EP4", 4, ep=4), {}),
    ("deepep", layout("TP2 SP EP2 ETP2", 4, tp=2, sp=True, ep=2, etp=2), CAPACITY),
    ("hybridep", layout("TP2 SP EP2 ETP2", 4, tp=2, sp=True, ep=2, etp=2), CAPACITY),
]


def train(cell: Cell) -> Trajectory:
    with flex_messages():
        return run_cell(cell)


@pytest.mark.parametrize(("library", "entry", "options"), CASES, ids=lambda v: getattr(v, "name", v) and str(v)[:9])
def test_flex_trains_what_one_process_trains(
    library: str, entry: GridCase, options: dict[str, Any], pool: GlooPool
) -> None:
    alone = Cell(tiny_model(moe=True, **options), replace(entry.parallel, **ALONE), steps=3)
    flex: dict[str, Any] = {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": library}
    cell = replace(alone, parallel=replace(entry.parallel, **flex))
    found = pool.run(entry.processes, train, cell)
    difference = compare(found[0], run_layout(pool, alone, 1))
    print(f"{library} {entry.name}: loss {difference.loss:.1e}, gradient norm {difference.norm:.1e}")
    assert difference.worst < TOLERANCE
