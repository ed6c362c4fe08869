"""The test of the nodes on real ranks: what each measures, and the one with another configuration and data is named."""

import os
from pathlib import Path
from unittest import mock

import torch.distributed as dist

from megatron_ext.config import load_run
from megatron_ext.launching.node_report import RankReport, bad_nodes, table
from megatron_ext.launching.node_test import measure_all
from megatron_ext.runtime.device import choose_device
from megatron_ext.runtime.liveness import Liveness
from megatron_ext.runtime.process_groups import split_process_group
from megatron_ext.testing.pool import GlooPool
from tests.support.workspace import run_mapping, write_run

LAYOUT = [
    "parallel.tensor_model_parallel_size=2",
    "parallel.sequence_parallel=true",
    "parallel.pipeline_model_parallel_size=2",
]


def measure(path: Path, odd: int) -> list[RankReport]:
    """What all ranks find, of which `odd` reads another learning rate and lacks data and kernels."""
    here = dist.get_rank() == odd
    changes = ["optimizer.lr=1", "data.train=[{path: gone/train}]", "runtime.kernels=triton"] if here else []
    run = load_run(path, [*LAYOUT, *changes])
    split_process_group(run.parallel, run.runtime)
    others = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with mock.patch.dict(os.environ, others, clear=True):  # the process is that of other tests too
        return measure_all(run, choose_device(run.runtime), Liveness())


def test_each_rank_measures_and_the_odd_one_is_named(pool: GlooPool, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for split in ("train", "validation"):
        (tmp_path / "data" / f"{split}.bin").write_bytes(b"1234")
    (tmp_path / "data" / "dataset.json").write_text("{}")
    path = write_run(tmp_path / "run.yaml", run_mapping(tmp_path))
    before = sorted(tmp_path.rglob("*"))
    [reports, *others] = pool.run(4, measure, path, 3)
    print(*table(reports), sep="\n")
    assert all(other == reports for other in others)
    assert [report.rank for report in reports] == list(range(4))
    assert {kind: link.ranks for kind, link in reports[3].links.items()} == {"TP": (2, 3), "PP": (1, 3)}
    assert all(report.product > 0 and report.memory_free > 0 for report in reports)
    assert all(link.rate > 0 for report in reports for link in report.links.values())
    assert [report.disk is not None for report in reports] == [True, False, False, False]
    assert sorted(tmp_path.rglob("*")) == before, "it leaves nothing behind"
    reasons = [bad.why for bad in bad_nodes(reports) if "median" not in bad.why]  # the machine may be busy
    assert [reason.split(" than ")[0].split(":")[0] for reason in reasons] == [
        "other configuration",
        "other data",
        "rank 3",
        "rank 3",
    ]
    assert "runtime.kernels = 'triton': " in reasons[-2]
    assert "data gone/train: " in reasons[-1]
