"""Rules of experts, their router and what balances them."""

from typing import Any

from megatron_ext.config.base import fields_of
from megatron_ext.config.model import ModelConfig
from megatron_ext.config.model_fields import EXPERT_FIELDS
from megatron_ext.config.rules.registry import (
    BACKEND,
    BALANCE,
    COEFFICIENT,
    COMPILE_ROUTER,
    EP,
    ETP,
    EXPERTS,
    GROUPS_OF_EXPERTS,
    SCORE,
    TP,
    rule,
)

# A kind of loss says nothing without a coefficient, and exports of dense models carry it.
_MAY_BE_DENSE = {"num_moe_experts", "moe_router_load_balancing_type"}

MOE_ONLY = {
    **{
        f"model.{name}": info.get_default(call_default_factory=True)
        for name, info in fields_of(ModelConfig).items()
        if name in EXPERT_FIELDS - _MAY_BE_DENSE
    },
    EP: 1,
    ETP: None,
    COMPILE_ROUTER: False,
}
"""Keys that only a model with experts can set, with the value that says nothing."""


def _register_moe_only(key: str, neutral: Any) -> None:
    @rule(key, EXPERTS)
    def _needs_experts(value: Any, experts: int | None) -> str | None:
        if experts is None and value != neutral:
            return "has no meaning in a dense model; set model.num_moe_experts or remove the key"
        return None


for _key, _neutral in MOE_ONLY.items():
    _register_moe_only(_key, _neutral)


@rule("model.moe_router_topk", EXPERTS)
def _topk_fits(topk: int, experts: int | None) -> str | None:
    return "cannot select more experts than there are" if experts and topk > experts else None


@rule("model.moe_router_topk", "model.moe_router_pre_softmax", given=(EXPERTS, SCORE))
def _top1_needs_pre_softmax(topk: int, pre_softmax: bool, experts: int | None, score: str) -> str | None:
    if experts and topk == 1 and not pre_softmax and score == "softmax":
        return "softmax over one selected expert is always 1 and trains no router; set moe_router_pre_softmax: true"
    return None


@rule("model.moe_router_topk", "model.moe_router_norm_topk_prob")
def _top1_is_not_normalized(topk: int, normalize: bool | None) -> str | None:
    return "one expert's score divided by itself is always 1 and trains no router" if topk == 1 and normalize else None


@rule("model.moe_router_norm_topk_prob", "model.moe_router_pre_softmax", given=(SCORE,))
def _post_softmax_sums_to_one(normalize: bool | None, pre_softmax: bool, score: str) -> str | None:
    if normalize is not None and score == "softmax" and not pre_softmax:
        return "a softmax over the selected experts sums to 1 already; remove it or set moe_router_pre_softmax: true"
    return None


@rule("model.moe_router_pre_softmax", SCORE)
def _pre_softmax_is_softmax(pre_softmax: bool, score: str) -> str | None:
    return "has no meaning with sigmoid scores; remove it" if pre_softmax and score != "softmax" else None


@rule(GROUPS_OF_EXPERTS, "model.moe_router_group_topk")
def _groups_come_with_choice(groups: int | None, topk: int | None) -> str | None:
    if (groups is None) != (topk is None):
        return "group-limited routing needs both"
    return "cannot select more groups than there are" if groups and topk and topk > groups else None


@rule(EXPERTS, GROUPS_OF_EXPERTS, "model.moe_router_group_score")
def _groups_divide_experts(experts: int | None, groups: int | None, score: str) -> str | None:
    if not experts or not groups:
        return "has no meaning without groups" if experts and score != "top2_sum" else None
    if experts % groups:
        return "experts must be a multiple of their groups"
    return (
        "a group needs two experts for the sum of its two best" if score == "top2_sum" and experts == groups else None
    )


@rule("model.moe_router_topk", "model.moe_router_group_topk", given=(EXPERTS, GROUPS_OF_EXPERTS))
def _topk_fits_groups(topk: int, group_topk: int | None, experts: int | None, groups: int | None) -> str | None:
    if experts and groups and group_topk and topk > group_topk * (experts // groups):
        return "the selected groups have fewer experts than each token is sent to"
    return None


@rule("model.moe_router_bias_update_rate", "model.moe_router_enable_expert_bias", given=(EXPERTS,))
def _rate_has_a_bias(rate: float, bias: bool, experts: int | None) -> str | None:
    if experts and rate != MOE_ONLY["model.moe_router_bias_update_rate"] and not bias:
        return "has no effect without the bias; set moe_router_enable_expert_bias: true"
    return None


@rule("model.moe_token_drop_policy", "model.moe_expert_capacity_factor", given=(EXPERTS,))
def _policy_has_a_capacity(policy: str, factor: float | None, experts: int | None) -> str | None:
    return "has no effect without a capacity" if experts and policy != "probs" and factor is None else None


@rule("model.moe_pad_expert_input_to_capacity", "model.moe_expert_capacity_factor", given=(EXPERTS,))
def _padding_has_a_capacity(pads: bool, factor: float | None, experts: int | None) -> str | None:
    return "there is no capacity to fill up; set one, or remove it" if experts and pads and factor is None else None


@rule("model.moe_pad_expert_input_to_capacity", EP, TP, given=("parallel.etp",))
def _padding_is_of_one_rank(pads: bool, ep: int, tp: int, etp: int) -> str | None:
    if pads and (ep > 1 or tp > 1 or etp > 1):
        return (
            "experts are filled up where one rank has all of each (megatron-core's own way cuts off what evaluation, "
            "which has no capacity, sends beyond it); remove moe_pad_expert_input_to_capacity, or train without expert "
            "and tensor parallelism"
        )
    return None


@rule("model.moe_pad_expert_input_to_capacity", BACKEND)
def _padding_is_of_the_torch_backend(pads: bool, backend: str) -> str | None:
    if pads and backend != "torch":
        return (
            "Transformer Engine's layers are fed by megatron-core's dispatcher; remove "
            "moe_pad_expert_input_to_capacity, or set backend: torch"
        )
    return None


@rule("model.moe_shared_expert_gate", "model.moe_shared_expert_intermediate_size")
def _gate_has_shared_experts(gate: bool, width: int | None) -> str | None:
    return "there is no shared expert to gate; set its size" if gate and width is None else None


@rule("model.moe_layer_freq", "model.num_layers")
def _layer_freq_fits(freq: int | list[int], layers: int) -> str | None:
    if isinstance(freq, list) and len(freq) != layers:
        return f"the list has {len(freq)} entries; it needs one a layer"
    return None


@rule(EXPERTS, "model.moe_first_k_dense", "model.moe_layer_freq", given=("model.is_moe",))
def _some_layer_is_moe(experts: int | None, first_dense: int, freq: int | list[int], is_moe: bool) -> str | None:
    return "no layer is left to be MoE" if experts and not is_moe else None


@rule(BALANCE, COEFFICIENT)
def _coefficient_has_a_loss(kinds: str | list[str], coefficient: float | list[float]) -> str | None:
    if isinstance(kinds, list):
        if not isinstance(coefficient, list) or len(coefficient) != len(kinds):
            return "a list of balance losses needs a list of as many coefficients"
        if "none" in kinds or len(set(kinds)) < len(kinds):
            return "a list holds each balance loss at most once, and not none"
        return None
    if isinstance(coefficient, list):
        return "a list of coefficients needs a list of balance losses"
    return "a coefficient without a balance loss; set the type to aux_loss" if kinds == "none" and coefficient else None


@rule("model.moe_adaptive_aux_loss", BALANCE)
def _adaptive_needs_one_loss(adaptive: Any, kinds: str | list[str]) -> str | None:
    if adaptive is not None and (kinds == "none" or isinstance(kinds, list)):
        return "adapts the coefficient of one balance loss; name it as moe_router_load_balancing_type"
    return None
