"""Builds the real Transformer Engine model where there is no GPU.

Nothing of it can compute there, but its parameters, checkpoints and FP8 recipes are the real ones. Transformer Engine
must be imported before megatron_ext, which otherwise hides it where there is no GPU (runtime/cpu_compat.py): a
`GlooPool` with `transformer_engine=True` has such processes.
"""

import contextlib
import functools
import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from megatron_ext.config import ModelConfig, ParallelConfig, Precision, RecomputeConfig

HOPPER = (9, 0)


@functools.cache
def why_not_importable() -> str | None:
    """Why `import transformer_engine.pytorch` fails in a fresh process; None where it succeeds."""
    try:
        version = importlib.metadata.version("transformer_engine")
    except importlib.metadata.PackageNotFoundError:
        return "Transformer Engine is not installed"
    code = "import torch, transformer_engine.pytorch"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    if process.returncode == 0:
        return None
    last = process.stderr.strip().splitlines()[-1:] or ["no message"]
    return f"Transformer Engine {version} does not import: {last[0]}"


@contextlib.contextmanager
def as_on_hopper() -> Iterator[None]:
    """While open, torch says that there is a Hopper GPU, and delayed scaling keeps its state in CPU memory."""
    from transformer_engine.pytorch.quantization import DelayedScalingRecipeState as State

    real = State.__init__

    def on_cpu(self: Any, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs | {"device": torch.device("cpu")})

    with (
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(torch.cuda, "current_device", return_value=0),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=HOPPER),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=SimpleNamespace(major=9, minor=0)),
        mock.patch.object(State, "__init__", on_cpu),
    ):
        yield


def build_with_transformer_engine(
    model: ModelConfig, parallel: ParallelConfig, precision: Precision, recompute: RecomputeConfig
) -> tuple[Any, list[Any]]:
    """The configuration that `transformer_config` makes for Transformer Engine and the model chunks, on CPU."""
    from megatron_ext.mcore.model import build_chunks
    from megatron_ext.mcore.transformer_config import transformer_config

    with as_on_hopper():
        # The fused permutation of tokens has no weights, but puts its index tensors on a GPU.
        overrides = {**model.transformer_overrides, "moe_permute_fusion": False}
        model = replace(model, transformer_overrides=overrides)
        config = transformer_config(model, parallel, precision, recompute, "transformer_engine")
        return config, list(build_chunks(model, parallel, config, torch.device("cpu")))
