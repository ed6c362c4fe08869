"""Rules about `precision: {kind: fp8}`; they say nothing about runs of another kind, which have no recipe."""

from typing import Any

from megatron_ext.config.rules.registry import (
    BACKEND,
    BF16_AT_END,
    BF16_AT_START,
    CP,
    DEVICE,
    GROUPS,
    HEADS,
    MLA,
    RECIPE,
    TP,
    rule,
)
from megatron_ext.config.rules.widths import SPLIT_WIDTHS, attention_widths

_MULTIPLE = 16
"""torch's fp8 kernels take rows and columns in whole 16 bytes."""
_DELAYED_ONLY: dict[str, Any] = {
    "precision.amax_history_len": 1024,
    "precision.amax_compute_algo": "max",
    "precision.margin": 0,
}


def _register_delayed_only(key: str, neutral: Any) -> None:
    @rule(key, RECIPE)
    def _needs_history(value: Any, recipe: str) -> str | None:
        return "has no effect; set recipe: delayed" if value != neutral and recipe != "delayed" else None


for _key, _neutral in _DELAYED_ONLY.items():
    _register_delayed_only(_key, _neutral)


@rule(BF16_AT_START, BF16_AT_END, "model.num_layers")
def _some_layer_is_fp8(start: int, end: int, layers: int) -> str | None:
    return "no layer is left in fp8; set precision.kind: bf16" if start + end >= layers else None


@rule(RECIPE, BACKEND)
def _backend_has_recipe(recipe: str, backend: str) -> str | None:
    if recipe == "rowwise" and backend != "torch":
        return "Transformer Engine has no such recipe; set recipe: blockwise or tensorwise, or runtime.backend: torch"
    return None


@rule(RECIPE, DEVICE, BACKEND)
def _device_has_kernel(recipe: str, device: str, backend: str) -> str | None:
    if recipe in ("blockwise", "mxfp8") and device == "cuda" and backend == "torch":
        return (
            "the torch backend computes this recipe on CPU only; set runtime.backend: transformer_engine, "
            "or recipe: rowwise"
        )
    return None


def _complaint(width: int, device: str, backend: str) -> str | None:
    """What is wrong with `width`, the size of a matrix on one rank; nothing where no kernel of torch will see it."""
    if device == "cpu" or backend != "torch" or width % _MULTIPLE == 0:
        return None
    return (
        f"torch's fp8 kernels need a multiple of {_MULTIPLE}, and one rank would have {width}; "
        "change the width or the layout, set precision.kind: bf16, or runtime.device: cpu"
    )


def _register_kernel_width(key: str, degree: str, used: str) -> None:
    @rule(key, degree, given=(used, DEVICE, BACKEND, RECIPE))
    def _width_fits_kernel(
        width: int | None, size: int, used: Any, device: str, backend: str, recipe: str
    ) -> str | None:
        return _complaint(width // size, device, backend) if used and width and width % size == 0 else None


for _split_width in SPLIT_WIDTHS:
    _register_kernel_width(*_split_width)


@rule("model.hidden_size", given=(DEVICE, BACKEND, RECIPE))
def _hidden_fits_kernel(hidden: int, device: str, backend: str, recipe: str) -> str | None:
    return _complaint(hidden, device, backend)


@rule(MLA, HEADS, GROUPS, "model.head_dim", TP, given=(DEVICE, BACKEND, RECIPE))
def _attention_fits_kernel(
    latent: Any, heads: int, groups: int | None, head_dim: int, tp: int, device: str, backend: str, recipe: str
) -> str | None:
    widths = attention_widths(latent, heads, groups, head_dim, tp)
    return next(filter(None, (_complaint(width, device, backend) for width in widths)), None)


@rule("data.sequence_length", "train.micro_batch_size", CP, given=("precision.fp8_wgrad", DEVICE, BACKEND))
def _tokens_fit_kernel(
    length: int, micro_batch: int, cp: int, fp8_wgrad: bool, device: str, backend: str
) -> str | None:
    tokens = length * micro_batch // cp
    if not fp8_wgrad or device == "cpu" or backend != "torch" or tokens % _MULTIPLE == 0:
        return None
    return (
        f"weight gradients are contracted over {tokens} tokens, and torch's fp8 kernels need a multiple of "
        f"{_MULTIPLE}; change the length, or set precision.fp8_wgrad: false"
    )
