"""Weight rules of experts, shared by the MoE architectures, and reasons against models with and without them."""

from megatron_ext.architectures.tables.llama_shape import LAYER, MEGATRON_LAYER
from megatron_ext.architectures.tables.rules import GateUp, Rename, Rule, in_moe_layers, with_shared_experts
from megatron_ext.architectures.tables.storage_variants import Stacked
from megatron_ext.config import ModelConfig

MEGATRON_MLP = f"{MEGATRON_LAYER}.mlp"


def dense_only(model: ModelConfig) -> str | None:
    """A reason against classes without experts."""
    return "it has no experts" if model.is_moe else None


def moe_only(model: ModelConfig) -> str | None:
    """A reason against classes that have experts."""
    return None if model.is_moe else "it has experts"


def routed_experts(
    block: str = f"{LAYER}.mlp", *, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> tuple[Rule, ...]:
    """The router and the routed experts of `block`, whose experts have gate, up and down projections of these names."""
    expert = f"{block}.experts.{{expert}}"
    return (
        Rename(f"{MEGATRON_MLP}.router.weight", in_moe_layers, hf=f"{block}.gate.weight"),
        GateUp(
            f"{MEGATRON_MLP}.experts.{{expert}}.linear_fc1.weight",
            in_moe_layers,
            gate=f"{expert}.{gate}.weight",
            up=f"{expert}.{up}.weight",
        ),
        Rename(
            f"{MEGATRON_MLP}.experts.{{expert}}.linear_fc2.weight",
            in_moe_layers,
            hf=f"{expert}.{down}.weight",
        ),
    )


def shared_experts(block: str) -> tuple[Rule, ...]:
    """The shared experts, computed as one feed-forward network, of the module `block`."""
    return (
        GateUp(
            f"{MEGATRON_MLP}.shared_experts.linear_fc1.weight",
            with_shared_experts,
            gate=f"{block}.gate_proj.weight",
            up=f"{block}.up_proj.weight",
        ),
        Rename(f"{MEGATRON_MLP}.shared_experts.linear_fc2.weight", with_shared_experts, hf=f"{block}.down_proj.weight"),
    )


def stacked_experts(
    block: str = f"{LAYER}.mlp", *, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> tuple[Stacked, ...]:
    """How transformers 5 stores the experts of a layer in one, if asked to keep its own layout."""
    expert, fused = f"{block}.experts.{{expert}}", f"{LAYER}.mlp.experts"
    return (
        Stacked(f"{fused}.gate_up_proj", (f"{expert}.{gate}.weight", f"{expert}.{up}.weight")),
        Stacked(f"{fused}.down_proj", (f"{expert}.{down}.weight",)),
    )
