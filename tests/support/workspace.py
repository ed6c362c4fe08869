"""Files that tests start real runs from: a corpus, a tokenizer, prepared data and a run configuration."""

import json
import random
from pathlib import Path
from typing import Any

from megatron_ext.config import dump_yaml
from megatron_ext.data.prepare.preprocess import preprocess
from megatron_ext.data.tokenizer import train_tokenizer
from megatron_ext.monitoring.metrics_file import read_metrics

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools"
WORDS = (
    "the model learns slowly when its data is small and every expert sees only a part of it , which is why we test"
).split()


def write_corpus(path: Path, documents: int = 300, seed: int = 0) -> Path:
    """A JSONL corpus of random sentences."""
    generator = random.Random(seed)
    with open(path, "w", encoding="utf-8") as file:
        for number in range(documents):
            words = generator.choices(WORDS, k=generator.randint(20, 120))
            file.write(
                json.dumps({"text": f"{number}: {' '.join(words)}.\n日本語 {number}"}, ensure_ascii=False) + "\n"
            )
    return path


def prepare_data(directory: Path) -> None:
    """Corpus, tokenizer and token files below `directory`."""
    corpus = write_corpus(directory / "corpus.jsonl")
    train_tokenizer([corpus], directory / "tokenizer", 330)
    preprocess([corpus], directory / "tokenizer", directory / "data", split=(0.8, 0.1, 0.1))


def run_mapping(directory: Path, *, moe: bool = False) -> dict[str, Any]:
    """A small run on the data of `prepare_data`."""
    model: dict[str, Any] = {
        "num_layers": 4,
        "hidden_size": 32,
        "ffn_hidden_size": 64,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "vocab_size": 330,
        "max_position_embeddings": 128,
    }
    if moe:
        model |= {
            "num_moe_experts": 4,
            "moe_ffn_hidden_size": 32,
            "moe_shared_expert_intermediate_size": 32,
            "moe_gating_normalization": {},
            "moe_aux_loss_coeff": 0.01,
        }
    return {
        "model": model,
        "precision": {"kind": "fp32"},
        "train": {"train_iters": 6, "global_batch_size": 8, "micro_batch_size": 2},
        "optimizer": {"kind": "adam", "lr": 1e-3},
        "schedule": {"kind": "cosine", "warmup_iters": 2},
        "data": {
            "sequence_length": 64,
            "tokenizer": str(directory / "tokenizer"),
            "cache_dir": str(directory / "cache"),
            "train": [{"path": str(directory / "data" / "train")}],
            "validation": [{"path": str(directory / "data" / "validation")}],
        },
        "checkpoint": {"directory": str(directory / "run"), "save_interval": 2},
        "runtime": {"device": "cpu", "threads": 1},
    }


def write_run(path: Path, mapping: dict[str, Any]) -> Path:
    """Write a run configuration."""
    path.write_text(dump_yaml(mapping))
    return path


def reported_losses(directory: Path) -> list[float]:
    """The training losses of a run, step by step."""
    return [record["loss"] for record in read_metrics(directory / "metrics.jsonl") if "loss" in record]
