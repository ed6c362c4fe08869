"""A run on one GPU with NCCL trains like the torch backend's on CPU, with either backend."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.config import ModelConfig, MultiLatentAttention, RunConfig, dump_yaml, load_config, to_mapping
from megatron_ext.config.output import Backend
from megatron_ext.runtime.accelerators import precision_fault, this_machine
from megatron_ext.testing.tiny import tiny_model
from megatron_ext.testing.transformer_engine import why_not_importable

# Widths in multiples of 16, for the fp8 kernels.
LATENT = MultiLatentAttention(q_lora_rank=32, kv_lora_rank=32, qk_head_dim=16, qk_pos_emb_head_dim=16, v_head_dim=16)
MODELS = {
    "dense": tiny_model(),
    "MoE": tiny_model(moe=True),
    "latent": tiny_model(num_query_groups=None, multi_latent_attention=LATENT),
}
# fp32 (TF32 is off by default): sums in another order. bf16 and fp8: numbers that such a sum moves over a rounding
# boundary, as between layouts on CPU (tests/distributed/test_fp8.py).
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2, "tensorwise": 2e-2, "rowwise": 2e-2, "delayed": 2e-2}


def run_config(
    model: ModelConfig, precision: dict[str, Any], device: str, directory: Path, backend: Backend = "torch"
) -> RunConfig:
    raw = {
        "model": to_mapping(model),
        "precision": precision,
        "train": {"train_iters": 3, "global_batch_size": 4, "micro_batch_size": 2},
        "optimizer": {"kind": "adam", "lr": 1e-3},
        "schedule": {"kind": "constant"},
        "data": {"sequence_length": 32, "tokenizer": "t", "cache_dir": "c", "train": [{"path": "p"}]},
        "checkpoint": {"directory": str(directory)},
        "runtime": {"device": device, "threads": 1, "backend": backend},
    }
    return load_config(RunConfig, raw, source="test")


SCRIPT = """
import json, sys
from pathlib import Path
from megatron_ext.config import load_run
from megatron_ext.mcore.optimizer import set_learning_rate
from megatron_ext.runtime.device import choose_device
from megatron_ext.runtime.process_groups import split_process_group, start_process_group
from megatron_ext.testing.tiny import random_batch
from megatron_ext.training.session import open_session

run = load_run(sys.argv[1])
device = choose_device(run.runtime)
start_process_group(run.runtime, device, alone=True)
groups = split_process_group(run.parallel, run.runtime)
session = open_session(run, run.resolve(1), groups, device)
set_learning_rate(session.optimizer, run.optimizer.lr)
steps = []
for step in range(3):
    batch = random_batch(step, samples=4, micro_batch=2, dp_rank=0, dp_size=1)
    result = session.step([micro.to(device) for micro in batch])
    steps.append((float(result.loss), result.grad_norm))
session.save()
print(json.dumps(steps))
"""


def trajectory(
    model: ModelConfig, precision: dict[str, Any], device: str, directory: Path, backend: Backend = "torch"
) -> list[list[float]]:
    """Loss and gradient norm of three steps in a process of their own: CPU runs prepare megatron-core for good."""
    import json

    directory.mkdir()
    path = directory / "run.yaml"
    path.write_text(dump_yaml(to_mapping(run_config(model, precision, device, directory / "checkpoint", backend))))
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    steps: list[list[float]] = json.loads(done.stdout.strip().splitlines()[-1])
    return steps


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("backend", ["torch", "transformer_engine"])
def test_a_gpu_trains_like_a_cpu(kind: str, precision: str, backend: Backend, tmp_path: Path) -> None:
    if backend == "transformer_engine" and (missing := why_not_importable()):
        pytest.skip(missing)
    if backend == "transformer_engine" and precision == "rowwise":
        pytest.skip("Transformer Engine has no such recipe")
    model = replace(MODELS[kind], num_layers=2)
    settings: dict[str, Any] = {"kind": precision}
    if precision not in ("fp32", "bf16"):
        settings = {"kind": "fp8", "recipe": precision}
        fp8 = run_config(model, settings, "cpu", tmp_path).precision
        missing = precision_fault(backend, fp8, this_machine(), has_experts=model.is_moe)
        if missing:
            pytest.skip(missing)
    on_cpu = trajectory(model, settings, "cpu", tmp_path / "cpu")
    on_gpu = trajectory(model, settings, "cuda", tmp_path / "cuda", backend)
    differences = [
        abs(a - b) / abs(a) for cpu, gpu in zip(on_cpu, on_gpu, strict=True) for a, b in zip(cpu, gpu, strict=True)
    ]
    print(f"{kind} {precision} {backend}: largest relative difference of loss and gradient norm {max(differences):.1e}")
    assert max(differences) < TOLERANCE[precision]
