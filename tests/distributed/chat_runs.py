"""Runs that train a small Llama of transformers on chat data: its files, and a training of them in this process."""

from pathlib import Path

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_ext.config import dump_yaml, load_run, to_mapping
from megatron_ext.data.stream.batches import MicroBatch
from megatron_ext.data.stream.position import Position
from megatron_ext.model_io.open import read_any_model
from megatron_ext.model_io.starting_weights import open_hugging_face
from megatron_ext.runtime.device import choose_device
from megatron_ext.runtime.process_groups import split_process_group
from megatron_ext.training import loop
from megatron_ext.training.data import open_data
from megatron_ext.training.session import starting_state
from megatron_ext.training.watch import watching

STEPS = 5


def write_chat_run(directory: Path, task: str, length: int) -> None:
    """Write `hf/`, a drawn model, and `run.yaml`, which trains it on the prepared `d/train` for STEPS steps."""
    config = LlamaConfig(
        vocab_size=360,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=length,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory / "hf")
    run = {
        "model": to_mapping(read_any_model(directory / "hf")),
        "precision": {"kind": "fp32"},
        "task": {"kind": task},
        "train": {"train_iters": STEPS, "global_batch_size": 4, "micro_batch_size": 2, "eval_iters": 1},
        "optimizer": {"kind": "adam", "lr": 1e-3, "weight_decay": 0.0},
        "schedule": {"kind": "constant"},
        "data": {
            "sequence_length": length,
            "tokenizer": str(directory / "d" / "tokenizer"),
            "train": [{"path": str(directory / "d" / "train")}],
            "validation": [{"path": str(directory / "d" / "train")}],
        },
        "checkpoint": {"directory": str(directory / "run"), "initialize_from": str(directory / "hf")},
        "logging": {"metrics_file": str(directory / "metrics.jsonl")},
        "runtime": {"device": "cpu", "threads": 1},
    }
    (directory / "run.yaml").write_text(dump_yaml(run))


def train_here(path: Path, overrides: list[str]) -> None:
    run = load_run(path, overrides)
    groups, device = split_process_group(run.parallel, run.runtime), choose_device(run.runtime)
    with watching(run) as others:
        loop.open_and_train(run, run.resolve(dist.get_world_size()), groups, device, others, open_hugging_face)


def batches_here(path: Path, overrides: list[str]) -> list[list[MicroBatch]]:
    """The micro-batches of every step, without training."""
    run = load_run(path, overrides)
    groups = split_process_group(run.parallel, run.runtime)
    data = open_data(run, starting_state(run), groups.dp, torch.device("cpu"))
    data.train.seek(Position(0))
    steps = [list(data.train.next()) for _ in range(STEPS)]
    data.close()
    return steps
