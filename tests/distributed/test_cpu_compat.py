"""Each shim of cpu_compat is needed: left out, megatron-core fails on CPU. One that is needed no more fails here."""

import datetime
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import get_cuda_rng_tracker, get_expert_parallel_rng_tracker_name

from megatron_ext.config import ParallelConfig
from megatron_ext.proving.parity import Cell, run_cell
from megatron_ext.runtime import cpu_compat
from megatron_ext.runtime.process_groups import end_process_groups
from megatron_ext.testing.tiny import tiny_model
from tests.support import forkserver
from tests.support.waiting import HANGS

PROCESSES = 4
EXPERTS = ParallelConfig(
    tensor_model_parallel_size=2,
    sequence_parallel=True,
    expert_model_parallel_size=2,
    expert_tensor_parallel_size=2,
    overlap_grad_reduce=True,
    overlap_param_gather=True,
)
PROBES = [
    Cell(tiny_model(moe=True), EXPERTS, steps=1, samples=4),
    # A tied output embedding on the last stage is moved "to the GPU".
    Cell(
        tiny_model(untie_embeddings_and_output_weights=False),
        ParallelConfig(pipeline_model_parallel_size=2),
        steps=1,
        samples=4,
    ),
    Cell(
        tiny_model(),
        ParallelConfig(
            pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2, use_distributed_optimizer=False
        ),
        steps=1,
        samples=4,
    ),
]


def probe(rank: int, left_out: frozenset[str], store: str, answers: Any) -> None:
    """Train the probes as one of PROCESSES ranks; answer None or the traceback."""
    try:
        cpu_compat.install(without=left_out)
        for number, cell in enumerate(PROBES):
            files = dist.FileStore(f"{store}{number}", PROCESSES)
            timeout = datetime.timedelta(seconds=HANGS)
            dist.init_process_group("gloo", store=files, rank=rank, world_size=PROCESSES, timeout=timeout)
            run_cell(cell)
            check_random_states()
            end_process_groups()
        is_compiler_out = "torch._inductor.compile_fx" not in sys.modules or torch.cuda.is_available()
        assert is_compiler_out, "torch's compiler was imported, for which a process starts more slowly"
        answers.put(None)
    except BaseException:
        answers.put(traceback.format_exc())


def check_random_states() -> None:
    """Random numbers of the tensor-parallel tracker differ from the others and leave them undisturbed."""
    before = torch.get_rng_state()
    with get_cuda_rng_tracker().fork():
        inside = torch.rand(4)
    assert torch.equal(torch.get_rng_state(), before), "drawing inside a fork moved the outer state"
    with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
        assert not torch.equal(torch.rand(4), inside), "two trackers draw the same numbers"
    assert not torch.equal(torch.rand(4), inside), "a tracker draws the outer numbers"


def first_failure(left_out: frozenset[str], directory: Path) -> str | None:
    """The traceback of the first rank that fails without `left_out`, or None if all succeed."""
    context = forkserver.context()
    answers = context.Queue()
    store = str(directory / "store")
    ranks = [context.Process(target=probe, args=(rank, left_out, store, answers)) for rank in range(PROCESSES)]
    for process in ranks:
        process.start()
    try:
        for _ in ranks:
            failure = answers.get(timeout=2 * HANGS)
            if failure is not None:
                return str(failure)
        return None
    finally:
        for process in ranks:
            process.kill()
            process.join()


def test_with_all_shims_it_runs(tmp_path: Path) -> None:
    assert first_failure(frozenset(), tmp_path) is None


@pytest.mark.parametrize("shim", cpu_compat.SHIMS, ids=lambda shim: shim.name)
def test_shim_is_needed(shim: cpu_compat.Shim, tmp_path: Path) -> None:
    failure = first_failure(frozenset({shim.name}), tmp_path)
    assert failure is not None, f"{shim.name} is no longer needed: remove it from cpu_compat.SHIMS"
    print(f"without {shim.name}: {failure.strip().splitlines()[-1]}")
