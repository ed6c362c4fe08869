"""Whether the GPU at hand has the kernels that an fp8 run needs."""

import torch

from megatron_ext.config import Fp8Precision
from megatron_ext.errors import EnvironmentFault


def require_kernels(precision: Fp8Precision, device: torch.device, *, has_experts: bool) -> None:
    """Raise EnvironmentFault, naming GPU and way out, where `device` cannot run `precision`. A CPU can run it all."""
    if device.type != "cuda":
        return
    missing = missing_kernel(precision, torch.cuda.get_device_capability(device), has_experts=has_experts)
    if missing is not None:
        name = torch.cuda.get_device_name(device)
        raise EnvironmentFault(f"precision.recipe = {precision.recipe!r} on {name}: {missing}")


def missing_kernel(precision: Fp8Precision, capability: tuple[int, int], *, has_experts: bool) -> str | None:
    """What a GPU of this compute capability lacks, and the way out; None if nothing."""
    if precision.recipe in ("blockwise", "mxfp8"):
        return (
            "the torch backend computes this recipe on CPU only; set runtime.backend: transformer_engine, "
            "or precision.recipe: rowwise"
        )
    generation = ".".join(map(str, capability))
    if capability < (8, 9):
        return f"compute capability {generation} has no fp8 (8.9, Ada, is the first); set precision.kind: bf16"
    if has_experts and capability != (9, 0):
        return (
            f"torch's grouped fp8 product exists for compute capability 9.0 (Hopper), not {generation}; "
            "set runtime.backend: transformer_engine, or precision.kind: bf16"
        )
    return None
