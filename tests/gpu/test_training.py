"""A run on one GPU with NCCL trains like the torch backend's on CPU, with either backend."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.config import (
    Fp8Precision,
    ModelConfig,
    MultiLatentAttention,
    RecomputeConfig,
    RunConfig,
    dump_yaml,
    load_config,
    to_mapping,
)
from megatron_ext.config.machine import Backend
from megatron_ext.runtime.accelerators import compiler_fault, precision_fault, this_machine
from megatron_ext.testing.tiny import tiny_model
from megatron_ext.testing.transformer_engine import why_not_importable

# Widths in multiples of 16, for the fp8 kernels.
LATENT = MultiLatentAttention(q_lora_rank=32, kv_lora_rank=32, qk_head_dim=16, qk_pos_emb_head_dim=16, v_head_dim=16)
MODELS = {
    "dense": tiny_model(),
    "MoE": tiny_model(moe=True),
    # On a GPU also with its routers compiled.
    "MoE, filled up": tiny_model(moe=True, moe_expert_capacity_factor=1.0, moe_pad_expert_input_to_capacity=True),
    "latent": tiny_model(num_query_groups=None, multi_latent_attention=LATENT),
}
# fp32 (TF32 is off by default): sums in another order. bf16 and fp8: numbers that such a sum moves over a rounding
# boundary, as between layouts on CPU (tests/distributed/test_fp8.py).
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2, "tensorwise": 2e-2, "rowwise": 2e-2, "delayed": 2e-2}


def run_config(
    model: ModelConfig, precision: dict[str, Any], device: str, directory: Path, backend: Backend = "torch"
) -> RunConfig:
    raw: dict[str, Any] = {
        "model": to_mapping(model),
        "precision": precision,
        "train": {"train_iters": 3, "global_batch_size": 4, "micro_batch_size": 2},
        "optimizer": {"kind": "adam", "lr": 1e-3},
        "schedule": {"kind": "constant"},
        "data": {"sequence_length": 32, "tokenizer": "t", "cache_dir": "c", "train": [{"path": "p"}]},
        "checkpoint": {"directory": str(directory)},
        "runtime": {"device": device, "threads": 1, "backend": backend},
    }
    if device == "cuda" and model.moe_pad_expert_input_to_capacity:
        raw["runtime"]["compile_router"] = True
    return load_config(RunConfig, raw, source="test")


SCRIPT = """
import json, sys, traceback
from pathlib import Path
from megatron_ext.config import load_run
from megatron_ext.data.stream.make_plan import SourceSize, make_plan
from megatron_ext.data.stream.stream import BatchShape
from megatron_ext.runtime.device import choose_device
from megatron_ext.runtime.process_groups import end_process_groups, split_process_group, start_process_group
from megatron_ext.testing.tiny import RandomStream
from megatron_ext.training.session import open_session

def train(run):
    device = choose_device(run.runtime)
    start_process_group(run.runtime, device, alone=True)
    groups = split_process_group(run.parallel, run.runtime)
    stream = RandomStream(BatchShape(4, 2), device)
    plan = make_plan(run.data, run.train, {"p": SourceSize(10**9)})
    session = open_session(run, run.resolve(1), groups, device, stream, plan)
    steps = []
    for _ in range(3):
        result = session.step(session.stream.next())
        steps.append((float(result.loss), result.grad_norm))
    session.save()
    session.close()
    end_process_groups()
    return steps

for path in sorted(Path(sys.argv[1]).glob("*.yaml")):
    try:
        answer = train(load_run(str(path)))
    except Exception:
        answer = traceback.format_exc()
        end_process_groups()
    path.with_suffix(".json").write_text(json.dumps(answer))
"""
NAMES = {"fp32": {"kind": "fp32"}, "bf16": {"kind": "bf16"}} | {
    recipe: {"kind": "fp8", "recipe": recipe} for recipe in ("tensorwise", "rowwise", "delayed")
}


MOVED = "moved"
"""In fp32, with all that layers keep in the host's memory."""


def why_not(backend: Backend, precision: str, kind: str) -> str | None:
    """Why this machine cannot train that; None where it can."""
    if backend == "transformer_engine" and (missing := why_not_importable()):
        return missing
    if MODELS[kind].moe_pad_expert_input_to_capacity:
        if backend != "torch":
            return "experts are filled up on the torch backend alone"
        if missing := compiler_fault(this_machine()):
            return missing
    if backend == "transformer_engine" and precision == "rowwise":
        return "Transformer Engine has no such recipe"
    if "recipe" not in NAMES[precision]:
        return None
    fp8 = Fp8Precision(kind="fp8", recipe=precision)  # type: ignore[arg-type]
    return precision_fault(backend, fp8, this_machine(), has_experts=MODELS[kind].is_moe)


class Trajectories:
    """Loss and gradient norm of three steps of every model, asked for by device and backend.

    A process trains all that one pair can train: importing megatron-core takes longer than all of it. It is one of its
    own because CPU runs prepare megatron-core for good.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._known: dict[tuple[str, str], dict[str, Any]] = {}

    def of(self, kind: str, precision: str, device: str, backend: Backend = "torch") -> list[list[float]]:
        if (device, backend) not in self._known:
            self._known[device, backend] = self._train(device, backend)
        answer = self._known[device, backend][f"{kind}-{precision}"]
        assert isinstance(answer, list), answer
        return answer

    def _train(self, device: str, backend: Backend) -> dict[str, Any]:
        directory = self._directory / f"{device}-{backend}"
        directory.mkdir()
        cases = [
            (kind, name) for kind in MODELS for name in NAMES if not (device == "cuda" and why_not(backend, name, kind))
        ]
        cases += [(kind, MOVED) for kind in MODELS if (device, backend) == ("cuda", "torch")]
        for kind, name in cases:
            model = replace(MODELS[kind], num_layers=2)
            run = run_config(model, NAMES.get(name, {"kind": "fp32"}), device, directory / f"{kind}-{name}", backend)
            if name == MOVED:
                run = replace(run, recompute=RecomputeConfig(offload_layers=2, offload_min_bytes=1))
            (directory / f"{kind}-{name}.yaml").write_text(dump_yaml(to_mapping(run)))
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(directory)], capture_output=True, text=True, timeout=300
        )
        answers = {path.stem: json.loads(path.read_text()) for path in directory.glob("*.json")}
        return {f"{kind}-{name}": answers.get(f"{kind}-{name}", done.stderr[-4000:]) for kind, name in cases}


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory: pytest.TempPathFactory) -> Trajectories:
    return Trajectories(tmp_path_factory.mktemp("trajectories"))


@pytest.mark.parametrize("backend", ["torch", "transformer_engine"])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("precision", TOLERANCE)
def test_a_gpu_trains_like_a_cpu(kind: str, precision: str, backend: Backend, trajectories: Trajectories) -> None:
    if missing := why_not(backend, precision, kind):
        pytest.skip(missing)
    on_cpu = trajectories.of(kind, precision, "cpu")
    on_gpu = trajectories.of(kind, precision, "cuda", backend)
    differences = [
        abs(a - b) / abs(a) for cpu, gpu in zip(on_cpu, on_gpu, strict=True) for a, b in zip(cpu, gpu, strict=True)
    ]
    print(f"{kind} {precision} {backend}: largest relative difference of loss and gradient norm {max(differences):.1e}")
    assert max(differences) < TOLERANCE[precision]


@pytest.mark.parametrize("kind", MODELS)
def test_activations_come_back_from_the_hosts_memory_as_they_went(kind: str, trajectories: Trajectories) -> None:
    on_cpu, on_gpu = trajectories.of(kind, "fp32", "cpu"), trajectories.of(kind, MOVED, "cuda")
    differences = [
        abs(a - b) / abs(a) for cpu, gpu in zip(on_cpu, on_gpu, strict=True) for a, b in zip(cpu, gpu, strict=True)
    ]
    print(f"{kind}: largest relative difference of loss and gradient norm {max(differences):.1e}")
    assert max(differences) < TOLERANCE["fp32"]
