"""Rules of how the model and its sequences are split."""

import math
from typing import Any

from megatron_ext.config.rules.registry import CP, EP, ETP, EXPERTS, GROUPS, HEADS, PP, SP, TP, VPP, rule


@rule(HEADS, TP)
def _tp_divides_heads(heads: int, tp: int) -> str | None:
    return "heads must be a multiple of the tensor-parallel size" if heads % tp else None


@rule(GROUPS, TP)
def _tp_divides_groups(groups: int | None, tp: int) -> str | None:
    return "query groups must be a multiple of the tensor-parallel size" if groups and groups % tp else None


def _register_tp_width(key: str, used: str) -> None:
    @rule(key, TP, given=(used,))
    def _width_splits(width: int | None, tp: int, used: Any) -> str | None:
        return "must be a multiple of the tensor-parallel size" if used and width and width % tp else None


_register_tp_width("model.ffn_hidden_size", "model.has_dense_layers")
_register_tp_width("model.moe_shared_expert_intermediate_size", EXPERTS)
_register_tp_width("model.padded_vocab_size", "model.padded_vocab_size")


@rule("model.expert_ffn_hidden_size", "parallel.etp", given=(EXPERTS,))
def _etp_divides_experts(width: int, etp: int, experts: int | None) -> str | None:
    return (
        "an expert's width must be a multiple of the expert-tensor-parallel size" if experts and width % etp else None
    )


@rule(EXPERTS, EP)
def _ep_divides_experts(experts: int | None, ep: int) -> str | None:
    return "experts must be a multiple of the expert-parallel size" if experts and experts % ep else None


@rule("model.num_layers", PP, VPP, given=("parallel.counted_as_layers",))
def _stages_divide_layers(layers: int, pp: int, vpp: int | None, more: int) -> str | None:
    if (layers + more) % (pp * (vpp or 1)):
        counted = f", and {more} more are counted for embedding and loss" if more else ""
        return (
            f"layers must be a multiple of pipeline stages x chunks a stage{counted} "
            "(parallel.account_for_embedding_in_pipeline_split and account_for_loss_in_pipeline_split count one each)"
        )
    return None


@rule("model.num_layers", PP, VPP, "parallel.counted_as_layers")
def _every_chunk_has_a_layer(layers: int, pp: int, vpp: int | None, more: int) -> str | None:
    if more and pp > 1 and layers + more <= pp * (vpp or 1):
        return "a chunk that counts the embedding or the loss has no layer left"
    return None


@rule(VPP, PP)
def _chunks_need_stages(vpp: int | None, pp: int) -> str | None:
    return "several chunks a stage need pipeline_model_parallel_size > 1" if vpp and pp == 1 else None


@rule(SP, TP)
def _sp_needs_tp(sp: bool, tp: int) -> str | None:
    return (
        "sequence parallelism splits within a tensor-parallel group; it needs more than one process"
        if sp and tp == 1
        else None
    )


@rule(TP, SP, given=(EXPERTS,))
def _moe_tp_needs_sp(tp: int, sp: bool, experts: int | None) -> str | None:
    if experts and tp > 1 and not sp:
        return "megatron-core trains MoE under tensor parallelism only with sequence_parallel: true"
    return None


@rule(TP, EP, ETP, given=(EXPERTS,))
def _expert_grid_is_right(tp: int, ep: int, etp: int | None, experts: int | None) -> str | None:
    if experts and ep == 1 and etp is not None and etp != tp:
        return (
            "with one expert-parallel rank megatron-core 0.16 reduces expert gradients over the wrong group, silently; "
            "remove expert_tensor_parallel_size or raise expert_model_parallel_size"
        )
    return None


@rule("data.sequence_length", TP, CP, given=(SP,))
def _sequence_splits(length: int, tp: int, cp: int, sp: bool) -> str | None:
    parts = cp * math.lcm(2 if cp > 1 else 1, tp if sp else 1)
    if length % parts == 0:
        return None
    context = "context parallelism gives each rank two equal slices" if cp > 1 else ""
    sequence = "sequence parallelism splits a rank's tokens over the tensor-parallel size" if sp else ""
    return f"must be a multiple of {parts}, since " + " and ".join(filter(None, (context, sequence)))


@rule("parallel.overlap_param_gather", "parallel.overlap_grad_reduce", "parallel.use_distributed_optimizer")
def _gather_overlap_needs_others(gather: bool | None, reduce: bool | None, distributed: bool) -> str | None:
    if gather and (reduce is False or not distributed):
        return "overlapping the gather needs both other options; remove it, or set them to true"
    return None
