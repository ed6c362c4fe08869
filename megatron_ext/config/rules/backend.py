"""Rules of the Transformer Engine backend and its FP8 recipes: what would be refused later on, or ignored."""

from typing import Any

from megatron_ext.config.rules.registry import (
    BACKEND,
    BF16_AT_END,
    BF16_AT_START,
    CP,
    DEVICE,
    EXPERTS,
    GROUPS,
    HEADS,
    KERNELS,
    MLA,
    PP,
    RECIPE,
    SP,
    TP,
    rule,
)
from megatron_ext.config.rules.widths import SPLIT_WIDTHS, attention_widths

MODULES = "recompute.modules"
TE = "transformer_engine"
ONLY_WITH_TE = frozenset(("moe_act",))
"""Modules whose recompute is Transformer Engine's alone; our activation keeps its input and no more anyway."""
_INPUTS = frozenset(("layernorm", "moe_act"))
"""Modules whose output is the input of a matrix product."""


def _multiple(recipe: str) -> int:
    """What the sides of FP8 matrices must be multiples of."""
    return 32 if recipe == "mxfp8" else 16


@rule(BACKEND, DEVICE)
def _te_needs_cuda(backend: str, device: str) -> str | None:
    if backend == TE and device == "cpu":
        return "Transformer Engine computes on CUDA only; set runtime.backend: torch, or remove runtime.device"
    return None


@rule(KERNELS, BACKEND)
def _te_has_its_own_kernels(kernels: str, backend: str) -> str | None:
    if kernels == "triton" and backend == TE:
        return "Transformer Engine's layers have kernels of their own; remove runtime.kernels, or set backend: torch"
    return None


@rule(MODULES, BACKEND)
def _torch_cannot_recompute(modules: list[str], backend: str) -> str | None:
    only = sorted(ONLY_WITH_TE & set(modules))
    if backend != TE and only:
        return f"{', '.join(only)}: recomputed with runtime.backend: transformer_engine only; leave out, or set that"
    return None


@rule(MODULES, EXPERTS)
def _expert_activation_needs_experts(modules: list[str], experts: int | None) -> str | None:
    return "moe_act is the activation of routed experts; remove it" if "moe_act" in modules and not experts else None


@rule("model.sliding_window", "model.attention_sinks", CP, given=(BACKEND,))
def _te_passes_keys_around(window: int | None, sinks: bool, cp: int, backend: str) -> str | None:
    if backend == TE and cp > 1 and (window is not None or sinks):
        return (
            "Transformer Engine passes keys and values around a ring of context-parallel ranks, which knows neither "
            "windows nor sinks; set runtime.backend: torch, or context_parallel_size: 1"
        )
    return None


@rule("model.add_bias_linear", "parallel.etp", EXPERTS, given=(BACKEND,))
def _expert_biases_are_whole(biases: bool, etp: int, experts: int | None, backend: str) -> str | None:
    if backend == TE and biases and experts and etp > 1:
        return "megatron-core would add experts' biases once a rank; set expert_tensor_parallel_size: 1"
    return None


@rule(RECIPE, BF16_AT_START, BF16_AT_END, given=(BACKEND,))
def _delayed_has_no_bf16_layers(recipe: str, start: int, end: int, backend: str) -> str | None:
    if backend == TE and recipe == "delayed" and start + end:
        return "delayed scaling reduces the maxima of all layers at once, leaving none out; set recipe: tensorwise"
    return None


@rule(RECIPE, MODULES, given=("recompute.granularity", BACKEND))
def _delayed_recomputes_no_inputs(recipe: str, modules: list[str], granularity: str | None, backend: str) -> str | None:
    if backend == TE and recipe == "delayed" and granularity == "selective" and _INPUTS & set(modules):
        return "delayed scaling would see a recomputed input twice; set recipe: tensorwise, or leave those modules out"
    return None


@rule("model.transformer_overrides", BACKEND)
def _offloading_needs_te(overrides: dict[str, Any], backend: str) -> str | None:
    if overrides.get("cpu_offloading") and backend != TE:
        return "cpu_offloading moves what Transformer Engine's layers keep; set recompute.offload_layers instead"
    return None


@rule("recompute.offload_layers", BACKEND)
def _te_moves_its_own(count: int, backend: str) -> str | None:
    if count and backend == TE:
        return "moves what the torch backend's layers keep; set cpu_offloading in model.transformer_overrides instead"
    return None


@rule("precision.fp8_wgrad", BACKEND)
def _te_wgrad_is_fp8(wgrad: bool, backend: str) -> str | None:
    if backend == TE and not wgrad:
        return "Transformer Engine computes weight gradients in FP8 all the same; remove it, or use the torch backend"
    return None


@rule("precision.keep_fp8_weights", BACKEND)
def _te_keeps_its_weights(keeps: bool, backend: str) -> str | None:
    if backend == TE and not keeps:
        return "Transformer Engine keeps weights in FP8 by rules of its own; remove it, or use the torch backend"
    return None


@rule(BF16_AT_START, BF16_AT_END, "model.num_layers", PP, given=(BACKEND,))
def _bf16_layers_fit_a_stage(start: int, end: int, layers: int, pp: int, backend: str) -> str | None:
    stage = layers // pp
    if backend == TE and max(start, end) > stage:
        return f"megatron-core keeps at most one pipeline stage's layers ({stage}) in bf16 at either end"
    return None


def _uneven(recipe: str, *sizes: int) -> str | None:
    multiple = _multiple(recipe)
    bad = [size for size in sizes if size % multiple]
    return f"FP8 kernels take multiples of {multiple}, and this gives {bad[0]}" if bad else None


def _register_even_width(width: str, split: str, used: str) -> None:
    @rule(RECIPE, width, split, given=(used, BACKEND))
    def _width_is_even(recipe: str, size: int | None, degree: int, used: Any, backend: str) -> str | None:
        return _uneven(recipe, size // degree) if backend == TE and used and size else None


for _split_width in SPLIT_WIDTHS:
    _register_even_width(*_split_width)


@rule(RECIPE, "model.hidden_size", given=(BACKEND,))
def _hidden_is_even(recipe: str, hidden: int, backend: str) -> str | None:
    return _uneven(recipe, hidden) if backend == TE else None


@rule(RECIPE, MLA, HEADS, GROUPS, "model.head_dim", TP, given=(BACKEND,))
def _attention_is_even(
    recipe: str, latent: Any, heads: int, groups: int | None, head_dim: int, tp: int, backend: str
) -> str | None:
    return _uneven(recipe, *attention_widths(latent, heads, groups, head_dim, tp)) if backend == TE else None


@rule(RECIPE, "train.micro_batch_size", "data.sequence_length", TP, CP, given=(SP, BACKEND))
def _tokens_are_even(recipe: str, micro: int, length: int, tp: int, cp: int, sp: bool, backend: str) -> str | None:
    """The tokens of one rank, which padding for experts must be able to fill up."""
    return _uneven(recipe, micro * length // (tp if sp else 1) // cp) if backend == TE else None
