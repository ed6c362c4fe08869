"""Canonical tensor names, and where each is stored in a Megatron checkpoint.

Canonical names are what rules and methods speak: one entry for each tensor of the model as a person would list it,
with unfused norms and one entry an expert. On disk dense norms have the names of Transformer Engine's fused layers,
and the experts of a layer are one stacked tensor. This file is the only place that knows both.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from megatron_ext.canonical.catalogue import CanonicalTensor, Shape

FUSED_NORMS = {
    "input_layernorm": "self_attention.linear_qkv",
    "pre_mlp_layernorm": "mlp.linear_fc1",
    "self_attention.q_layernorm": "self_attention.linear_q_up_proj",
    "self_attention.kv_layernorm": "self_attention.linear_kv_up_proj",
}
"""The linear layer that Transformer Engine fuses a norm into, in the layers that have this linear layer."""

_LAYER = r"(decoder\.layers\.\d+)"
_NORM = re.compile(rf"{_LAYER}\.({'|'.join(map(re.escape, FUSED_NORMS))})\.(weight|bias)")
_FUSED_NORM = re.compile(rf"{_LAYER}\.({'|'.join(map(re.escape, FUSED_NORMS.values()))})\.layer_norm_(weight|bias)")
_OF_AN_EXPERT = r"(linear_fc[12]\.(?:weight|bias|lora\.\w+\.[AB]))"
_EXPERT = re.compile(rf"{_LAYER}\.mlp\.experts\.(\d+)\.{_OF_AN_EXPERT}")
_STORED_EXPERTS = re.compile(rf"{_LAYER}\.mlp\.experts\.experts\.{_OF_AN_EXPERT}")
_STACKED_LAYERS = re.compile(r"decoder\.layers\.(?!\d)(.+)")
_NOT_WEIGHTS = ("optimizer.", "router.coefficient.", "chained_", "rng_state", "rerun_state")


@dataclass(frozen=True)
class StorageLocation:
    """A canonical tensor's storage location: the part of `key` at `index` (indices of leading dimensions)."""

    key: str
    index: Shape = ()


def stored_names(tensors: Mapping[str, Shape]) -> dict[str, StorageLocation]:
    """Map every canonical name to its place, for the keys and global shapes of a checkpoint.

    Also understands checkpoints that stack the layers of homogeneous models ([layers, ...] under one key).
    """
    names: dict[str, StorageLocation] = {}
    for key, shape in tensors.items():
        if key.startswith(_NOT_WEIGHTS) or "_extra_state" in key:
            continue
        stacked_layers = _STACKED_LAYERS.fullmatch(key)
        layers = range(shape[0]) if stacked_layers else (None,)
        for layer in layers:
            one = key if layer is None else f"decoder.layers.{layer}.{stacked_layers[1]}"  # type: ignore[index]
            index = () if layer is None else (layer,)
            experts = _STORED_EXPERTS.fullmatch(one)
            if experts:
                for expert in range(shape[len(index)]):
                    name = f"{experts[1]}.mlp.experts.{expert}.{experts[2]}"
                    names[name] = StorageLocation(key, (*index, expert))
            else:
                names[_unfused(one)] = StorageLocation(key, index)
    return names


def _unfused(key: str) -> str:
    fused = _FUSED_NORM.fullmatch(key)
    if not fused:
        return key
    norm = next(norm for norm, linear in FUSED_NORMS.items() if linear == fused[2])
    return f"{fused[1]}.{norm}.{fused[3]}"


def storage_plan(shapes: Mapping[str, Shape]) -> dict[str, tuple[StorageLocation, Shape]]:
    """Map every canonical name of a model to its place in a new checkpoint and the global shape of its key."""
    experts = _expert_counts(shapes)
    plan: dict[str, tuple[StorageLocation, Shape]] = {}
    for name, shape in shapes.items():
        expert, norm = _EXPERT.fullmatch(name), _NORM.fullmatch(name)
        if expert:
            stored = StorageLocation(f"{expert[1]}.mlp.experts.experts.{expert[3]}", (int(expert[2]),))
            plan[name] = stored, (experts[expert[1]], *shape)
        elif norm and f"{norm[1]}.{FUSED_NORMS[norm[2]]}.weight" in shapes:
            plan[name] = StorageLocation(f"{norm[1]}.{FUSED_NORMS[norm[2]]}.layer_norm_{norm[3]}"), shape
        else:
            plan[name] = StorageLocation(name), shape
    return plan


def _expert_counts(names: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in names:
        if match := _EXPERT.fullmatch(name):
            counts[match[1]] = max(counts.get(match[1], 0), int(match[2]) + 1)
    return counts


def tensors_by_location(tensors: Mapping[str, CanonicalTensor]) -> dict[StorageLocation, CanonicalTensor]:
    """`tensors`, by canonical name, by where a checkpoint of ours stores them."""
    plan = storage_plan({name: tensor.shape for name, tensor in tensors.items()})
    return {place: tensors[name] for name, (place, _) in plan.items()}
