"""Rules between configuration keys: each names its keys, says what is wrong with their values, and the way out.

A rule is a pure function of leaf values, so the loader can apply it to the keys that are right even when others in
the same file are not, and report everything at once.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Check = Callable[..., str | None]


@dataclass(frozen=True)
class Rule:
    """`check` takes the values of `keys`, then of `given`, and returns a complaint or None.

    `keys` are named with their values in the complaint; `given` are only read.
    """

    keys: tuple[str, ...]
    given: tuple[str, ...]
    check: Check

    def violation(self, values: Mapping[str, Any]) -> str | None:
        """The complaint about `values` (leaf key to value), or None. A rule with an unknown key says nothing."""
        if any(key not in values for key in self.keys + self.given):
            return None
        complaint = self.check(*(values[key] for key in self.keys + self.given))
        if complaint is None:
            return None
        return ", ".join(f"{key} = {values[key]!r}" for key in self.keys) + f": {complaint}"


RULES: list[Rule] = []


def rule(*keys: str, given: tuple[str, ...] = ()) -> Callable[[Check], Check]:
    """Register the decorated function as a rule over `keys`."""

    def register(check: Check) -> Check:
        RULES.append(Rule(keys, given, check))
        return check

    return register


def violations(values: Mapping[str, Any]) -> list[str]:
    """Every rule's complaint about `values`, in the order the rules are written."""
    return [complaint for r in RULES if (complaint := r.violation(values)) is not None]


HEADS = "model.num_attention_heads"
GROUPS = "model.num_query_groups"
EXPERTS = "model.num_moe_experts"
SCORE = "model.moe_router_score_function"
GROUPS_OF_EXPERTS = "model.moe_router_num_groups"
BALANCE = "model.moe_router_load_balancing_type"
COEFFICIENT = "model.moe_aux_loss_coeff"
MLA = "model.multi_latent_attention"
TP = "parallel.tensor_model_parallel_size"
SP = "parallel.sequence_parallel"
CP = "parallel.context_parallel_size"
PP = "parallel.pipeline_model_parallel_size"
VPP = "parallel.virtual_pipeline_model_parallel_size"
EP = "parallel.expert_model_parallel_size"
ETP = "parallel.expert_tensor_parallel_size"
MOE_ONLY = {
    "model.moe_ffn_hidden_size": None,
    "model.moe_router_topk": 2,
    "model.moe_router_pre_softmax": False,
    "model.moe_router_topk_scaling_factor": None,
    "model.moe_router_score_function": "softmax",
    "model.moe_router_norm_topk_prob": None,
    "model.moe_router_num_groups": None,
    "model.moe_router_group_topk": None,
    "model.moe_router_enable_expert_bias": False,
    "model.moe_router_noise": None,
    "model.moe_gating_normalization": None,
    "model.moe_expert_capacity_factor": None,
    "model.moe_shared_expert_gate": False,
    "model.moe_adaptive_aux_loss": None,
    "model.moe_z_loss_coeff": 0.0,
    "model.moe_shared_expert_intermediate_size": None,
    "model.moe_first_k_dense": 0,
    "model.moe_layer_freq": 1,
    "model.moe_aux_loss_coeff": 0.0,
    EP: 1,
    ETP: None,
}


def _register_moe_only(key: str, neutral: Any) -> None:
    @rule(key, EXPERTS)
    def _needs_experts(value: Any, experts: int | None) -> str | None:
        if experts is None and value != neutral:
            return "has no meaning in a dense model; set model.num_moe_experts or remove the key"
        return None


for _key, _neutral in MOE_ONLY.items():
    _register_moe_only(_key, _neutral)


@rule(HEADS, GROUPS)
def _groups_divide_heads(heads: int, groups: int | None) -> str | None:
    return "heads must be a multiple of query groups" if groups and heads % groups else None


@rule("model.hidden_size", HEADS, given=("model.kv_channels", MLA))
def _heads_divide_hidden(hidden: int, heads: int, kv_channels: int | None, latent: Any) -> str | None:
    if kv_channels is None and latent is None and hidden % heads:
        return "hidden size must be a multiple of heads unless model.kv_channels is set"
    return None


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
        return "has no meaning without groups" if score != "top2_sum" and not groups else None
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


@rule("model.moe_router_bias_update_rate", "model.moe_router_enable_expert_bias")
def _rate_has_a_bias(rate: float, bias: bool) -> str | None:
    return (
        "has no effect without the bias; set moe_router_enable_expert_bias: true" if rate != 1e-3 and not bias else None
    )


@rule("model.moe_token_drop_policy", "model.moe_expert_capacity_factor")
def _policy_has_a_capacity(policy: str, factor: float | None) -> str | None:
    return "has no effect without a capacity" if policy != "probs" and factor is None else None


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


@rule(HEADS, TP)
def _tp_divides_heads(heads: int, tp: int) -> str | None:
    return "heads must be a multiple of the tensor-parallel size" if heads % tp else None


@rule(GROUPS, TP)
def _tp_divides_groups(groups: int | None, tp: int) -> str | None:
    return "query groups must be a multiple of the tensor-parallel size" if groups and groups % tp else None


def _register_tp_width(key: str, degree: str, name: str) -> None:
    @rule(key, degree)
    def _width_splits(width: int | None, size: int | None) -> str | None:
        return f"must be a multiple of the {name} size" if width and size and width % size else None


_register_tp_width("model.ffn_hidden_size", TP, "tensor-parallel")
_register_tp_width("model.moe_shared_expert_intermediate_size", TP, "tensor-parallel")
_register_tp_width("model.padded_vocab_size", TP, "tensor-parallel")


@rule("model.expert_ffn_hidden_size", "parallel.etp", given=(EXPERTS,))
def _etp_divides_experts(width: int, etp: int, experts: int | None) -> str | None:
    return (
        "an expert's width must be a multiple of the expert-tensor-parallel size" if experts and width % etp else None
    )


@rule(EXPERTS, EP)
def _ep_divides_experts(experts: int | None, ep: int) -> str | None:
    return "experts must be a multiple of the expert-parallel size" if experts and experts % ep else None


@rule("model.num_layers", PP, VPP)
def _stages_divide_layers(layers: int, pp: int, vpp: int | None) -> str | None:
    if layers % (pp * (vpp or 1)):
        return "layers must be a multiple of pipeline stages x chunks a stage"
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


@rule("data.reset_attention_mask", "runtime.backend")
def _documents_need_our_attention(reset: bool, backend: str) -> str | None:
    if reset and backend != "torch":
        return "Transformer Engine's attention would ignore the documents; set runtime.backend: torch"
    return None


@rule("data.reset_position_ids", "data.reset_attention_mask", "model.position_embedding_type")
def _rotary_positions_restart_with_attention(positions: bool, attention: bool, embedding: str) -> str | None:
    if positions and not attention and embedding == "rope":
        return (
            "rotary embedding knows distances, not positions: while tokens attend across documents nothing starts "
            "anew; set data.reset_attention_mask: true or remove reset_position_ids"
        )
    return None


@rule("data.sequence_length", "model.max_position_embeddings", given=("model.rope_scaling",))
def _sequence_fits_model(length: int, positions: int, scaling: Any) -> str | None:
    # To dynamic scaling max_position_embeddings is the length before it sets in.
    longest = positions * scaling.factor if scaling is not None and scaling.kind == "dynamic" else positions
    if length > longest:
        return "samples are longer than the model is declared for; raise max_position_embeddings"
    return None


@rule("parallel.overlap_param_gather", "parallel.overlap_grad_reduce", "parallel.use_distributed_optimizer")
def _gather_overlap_needs_others(gather: bool, reduce: bool, distributed: bool) -> str | None:
    return "overlapping the gather needs both other options" if gather and not (reduce and distributed) else None


@rule("train.global_batch_size", "train.micro_batch_size")
def _micro_divides_global(global_batch: int, micro: int) -> str | None:
    return "the global batch must be a multiple of the micro-batch" if global_batch % micro else None


@rule("train.eval_interval", given=("data.validation",))
def _eval_needs_data(interval: int | None, validation: list[Any]) -> str | None:
    return "validation needs data.validation" if interval and not validation else None


@rule("schedule.warmup_iters", "train.train_iters")
def _warmup_fits(warmup: int, iters: int) -> str | None:
    return "warmup is longer than the run" if warmup > iters else None


@rule("schedule.warmup_iters", "schedule.decay_iters")
def _decay_after_warmup(warmup: int, decay: int | None) -> str | None:
    return "the decay must end after the warmup" if decay and decay <= warmup else None


@rule("schedule.wsd_decay_iters", "schedule.warmup_iters", "train.train_iters")
def _wsd_fits(decay: int, warmup: int, iters: int) -> str | None:
    return "warmup and final decay together are longer than the run" if decay + warmup > iters else None


@rule("schedule.min_lr", "optimizer.lr")
def _floor_below_peak(floor: float, peak: float) -> str | None:
    return "the final learning rate is above the peak" if floor > peak else None


@rule("schedule.decay_style", "schedule.min_lr")
def _exponential_needs_floor(style: str, floor: float) -> str | None:
    return "an exponential decay never reaches 0; set min_lr" if style == "exponential" and floor == 0 else None


@rule("recompute.granularity", "recompute.num_layers", given=("model.num_layers", PP, VPP))
def _recompute_fits(granularity: str | None, chunk: int, layers: int, pp: int, vpp: int | None) -> str | None:
    stage = layers // (pp * (vpp or 1))
    return f"a stage chunk has only {stage} layers" if granularity == "full" and chunk > stage else None


@rule("recompute.modules", "recompute.granularity")
def _modules_are_selective(modules: list[str], granularity: str | None) -> str | None:
    if granularity == "selective":
        return None if modules else "nothing would be recomputed; name modules, or unset the granularity"
    return "has no effect; set granularity: selective" if modules != ["core_attn"] else None


@rule("recompute.method", "recompute.num_layers", "recompute.granularity")
def _method_is_full(method: str, layers: int, granularity: str | None) -> str | None:
    given = (method, layers) != ("uniform", 1)
    return "have no effect; set granularity: full" if given and granularity != "full" else None


@rule("model.transformer_overrides")
def _overrides_stay_in_their_lane(overrides: dict[str, Any]) -> str | None:
    owned = sorted(set(overrides) & OWNED_BY_US)
    return f"{', '.join(owned)}: set through this file's own keys, not as an override" if owned else None


OWNED_BY_US = frozenset(
    "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels layernorm_epsilon "
    "init_method_std num_moe_experts moe_ffn_hidden_size moe_router_topk moe_router_pre_softmax "
    "moe_router_topk_scaling_factor moe_shared_expert_intermediate_size moe_layer_freq "
    "moe_router_load_balancing_type moe_aux_loss_coeff moe_z_loss_coeff moe_router_score_function "
    "moe_router_num_groups moe_router_group_topk moe_router_enable_expert_bias moe_router_bias_update_rate "
    "moe_expert_capacity_factor moe_token_drop_policy moe_shared_expert_gate tensor_model_parallel_size "
    "pipeline_model_parallel_size virtual_pipeline_model_parallel_size context_parallel_size "
    "expert_model_parallel_size expert_tensor_parallel_size sequence_parallel moe_token_dispatcher_type "
    "recompute_granularity recompute_method recompute_num_layers recompute_modules params_dtype pipeline_dtype bf16 "
    "calculate_per_token_loss batch_p2p_comm overlap_p2p_comm perform_initialization "
    "activation_func add_bias_linear add_qkv_bias attention_dropout gated_linear_unit hidden_dropout "
    "multi_latent_attention normalization qk_layernorm".split()
)
"""TransformerConfig fields that this framework derives; an override could contradict them silently."""
