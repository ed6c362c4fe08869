"""Rules of how tokens travel to their experts, and of what is computed meanwhile."""

from megatron_ext.config.rules.registry import DEVICE, EP, EXPERTS, rule

DISPATCHER = "parallel.moe_token_dispatcher_type"
LIBRARY = "parallel.moe_flex_dispatcher_backend"
OVERLAP = "parallel.moe_shared_expert_overlap"
SHARED = "model.moe_shared_expert_intermediate_size"
MODULES = "recompute.modules"
DEEPEP_RANKS = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 144, 160)
"""Sizes of groups that DeepEP has settings for (Buffer.get_dispatch_config of release 1; it refuses others)."""
_WAY_OUT = "set parallel.moe_token_dispatcher_type: alltoall"


@rule(DISPATCHER, DEVICE)
def _flex_needs_cuda(dispatcher: str, device: str) -> str | None:
    return f"its libraries send between GPUs; {_WAY_OUT}" if dispatcher == "flex" and device == "cpu" else None


@rule(DISPATCHER, "precision.kind")
def _flex_sends_bf16(dispatcher: str, precision: str) -> str | None:
    return f"its libraries send bf16; {_WAY_OUT}" if dispatcher == "flex" and precision == "fp32" else None


@rule(DISPATCHER, "runtime.deterministic")
def _flex_has_no_order(dispatcher: str, deterministic: bool) -> str | None:
    if dispatcher == "flex" and deterministic:
        return f"its libraries do not say in which order they add up; {_WAY_OUT}"
    return None


@rule(DISPATCHER, EXPERTS, EP, "parallel.etp")
def _flex_has_somewhere_to_send(dispatcher: str, experts: int | None, ep: int, etp: int) -> str | None:
    if dispatcher == "flex" and (not experts or ep * etp == 1):
        return f"nothing is sent where every rank has all experts; {_WAY_OUT}"
    return None


@rule(EP, "parallel.etp", given=("parallel.flex_backend",))
def _deepep_has_settings(ep: int, etp: int, library: str | None) -> str | None:
    if library == "deepep" and ep * etp > 1 and ep * etp not in DEEPEP_RANKS:
        sizes = ", ".join(map(str, DEEPEP_RANKS))
        return f"DeepEP sends within groups of {sizes} ranks, and this gives {ep * etp}; {_WAY_OUT}"
    return None


@rule(DISPATCHER, "model.hidden_size")
def _rows_are_of_16_bytes(dispatcher: str, hidden: int) -> str | None:
    return (
        f"its libraries send 16 bytes at a time: must be a multiple of 8; {_WAY_OUT}"
        if dispatcher == "flex" and hidden % 8
        else None
    )


@rule(LIBRARY, DISPATCHER)
def _only_flex_has_a_library(library: str | None, dispatcher: str) -> str | None:
    return (
        "no library sends; set moe_token_dispatcher_type: flex, or remove it"
        if library and dispatcher != "flex"
        else None
    )


@rule(OVERLAP, SHARED, DISPATCHER, EP, "parallel.etp", given=(EXPERTS,))
def _something_is_overlapped(
    overlap: bool, shared: int | None, dispatcher: str, ep: int, etp: int, experts: int | None
) -> str | None:
    if overlap and not (experts and shared and dispatcher == "alltoall" and ep * etp > 1):
        return "there must be shared experts, and tokens that alltoall sends to other ranks; remove it"
    return None


@rule(OVERLAP, "model.moe_shared_expert_gate")
def _overlapped_experts_have_no_gate(overlap: bool, gate: bool) -> str | None:
    if overlap and gate:
        return (
            "megatron-core reads the gate of overlapped shared experts where nothing waits for it to be gathered; "
            "remove moe_shared_expert_overlap"
        )
    return None


@rule(OVERLAP, MODULES, given=("recompute.granularity",))
def _overlapped_experts_are_kept(overlap: bool, modules: list[str], granularity: str | None) -> str | None:
    if overlap and granularity == "selective" and "shared_experts" in modules:
        return "what is computed in parts is not recomputed; leave shared_experts out, or remove the overlap"
    return None
