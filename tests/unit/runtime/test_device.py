"""Devices, launch variables and random states: what is asked for is given, or refused with the reason."""

import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_ext.config import RuntimeConfig
from megatron_ext.errors import EnvironmentFault
from megatron_ext.runtime.device import choose_device
from megatron_ext.runtime.process_groups import start_process_group
from megatron_ext.runtime.seeds import random_state, restore_random_state, seed_everything
from megatron_ext.testing.pool import GlooPool
from megatron_ext.testing.ports import free_port

CPU = torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_that_is_not_there_is_refused() -> None:
    with pytest.raises(EnvironmentFault, match=r"runtime\.device = 'cuda': torch finds no CUDA device"):
        choose_device(RuntimeConfig(device="cuda"))


def test_a_half_set_launch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(EnvironmentFault, match="RANK, WORLD_SIZE set, but not MASTER_ADDR, MASTER_PORT"):
        start_process_group(RuntimeConfig(), CPU)


def test_a_port_that_is_taken_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    with socket.socket() as another_run:
        another_run.bind(("", port))
        another_run.listen()
        with pytest.raises(
            EnvironmentFault, match=rf"MASTER_PORT = {port}: rank 0 cannot join .*already in use.*another one"
        ):
            start_process_group(RuntimeConfig(), CPU)


def drawn_twice() -> tuple[list[float], list[float]]:
    """Numbers drawn after a state was saved, and again after it was restored."""

    def draw() -> list[float]:
        return [
            random.random(),
            float(np.random.rand()),
            float(torch.rand(())),
            random.gauss(0, 1),
            float(np.random.randn()),
        ]

    from megatron_ext.config import ParallelConfig
    from megatron_ext.runtime.process_groups import split_process_group

    split_process_group(ParallelConfig(), RuntimeConfig(device="cpu"))
    seed_everything(5)
    np.random.randn()  # leaves half of a pair behind, which is part of the state
    state = random_state(CPU)
    first = draw()
    seed_everything(6)
    restore_random_state(state, CPU)
    return first, draw()


def test_random_states_repeat(pool: GlooPool) -> None:
    first, second = pool.run(1, drawn_twice)[0]
    assert first == second


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize(
    "module", ["training.loop", "training.session", "model_io.logits", "testing.preload", "mcore.model"]
)
def test_transformer_engine_is_kept_out_where_there_is_no_gpu(module: str, tmp_path: Path) -> None:
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").write_text("raise SystemExit('Transformer Engine was imported')")
    code = f"import megatron_ext.{module}, megatron.core.optimizer"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
