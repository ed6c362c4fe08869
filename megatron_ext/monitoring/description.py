"""What is recorded of a run when it starts: its layout, the versions and the machine, its configuration."""

import importlib.metadata
import platform
from typing import Any

import torch

from megatron_ext.config import Layout, RunConfig, to_mapping

_PACKAGES = ("torch", "megatron-core", "transformer-engine")


def describe_start(run: RunConfig, layout: Layout) -> dict[str, Any]:
    """JSON-ready: `layout` and `versions`, each by name, and `run`, the resolved configuration."""
    degrees = {
        "TP": run.parallel.tensor_model_parallel_size,
        "CP": run.parallel.context_parallel_size,
        "PP": run.parallel.pipeline_model_parallel_size,
        "EP": run.parallel.expert_model_parallel_size,
    }
    shown = {name: degree for name, degree in degrees.items() if degree > 1}
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        versions["device"] = torch.cuda.get_device_name()
    return {
        "layout": {"processes": layout.world_size, **shown, "DP": layout.dp},
        "versions": versions,
        "run": to_mapping(run),
    }
