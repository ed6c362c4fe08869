"""The smallest run that is valid, with sections merged in, and what is wrong with it."""

from typing import Any

import pytest

from megatron_ext.config import (
    RunConfig,
    load_config,
)
from megatron_ext.errors import ConfigError


def mapping(**sections: Any) -> dict[str, Any]:
    """A minimal valid run with sections merged in."""
    base: dict[str, Any] = {
        "model": {
            "num_layers": 4,
            "hidden_size": 64,
            "ffn_hidden_size": 96,
            "num_attention_heads": 4,
            "vocab_size": 1000,
        },
        "precision": {"kind": "fp32"},
        "train": {"train_iters": 100, "global_batch_size": 8},
        "optimizer": {"kind": "adam", "lr": 1e-3},
        "schedule": {"kind": "cosine"},
        "data": {"sequence_length": 64, "train": [{"path": "a"}], "tokenizer": "t", "cache_dir": "c"},
        "checkpoint": {"directory": "d"},
    }
    for name, values in sections.items():
        base[name] = {**base.get(name, {}), **values}
    return base


def load(raw: Any, *overrides: str) -> RunConfig:
    return load_config(RunConfig, raw, overrides, source="run.yaml")


def faults(raw: Any, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(raw, *overrides)
    return str(caught.value)
