"""Rules between configuration keys: each names its keys, says what is wrong with their values, and the way out.

A rule is a pure function of leaf values, so the loader can apply it to the keys that are right even when others in
the same file are not, and report everything at once.
"""

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
MLA = "model.multi_latent_attention"
TP = "parallel.tensor_model_parallel_size"
SP = "parallel.sequence_parallel"
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


PENDING: dict[str, Any] = {
    "model.moe_router_score_function": "softmax",
    "model.moe_router_norm_topk_prob": None,
    "model.moe_router_num_groups": None,
    "model.moe_router_group_topk": None,
    "model.moe_router_enable_expert_bias": False,
    "model.moe_router_noise": None,
    "model.moe_expert_capacity_factor": None,
    "model.moe_shared_expert_gate": False,
    "model.moe_adaptive_aux_loss": None,
    "model.moe_z_loss_coeff": 0.0,
    "parallel.context_parallel_size": 1,
    "data.reset_attention_mask": False,
    "data.reset_position_ids": False,
    "runtime.backend": "torch",
    "precision.recipe": None,
}
"""Keys that are planned; any other value than this is refused until they are built."""


def _register_pending(key: str, neutral: Any) -> None:
    @rule(key)
    def _not_built(value: Any) -> str | None:
        return None if value == neutral else "is not built yet"


for _key, _neutral in PENDING.items():
    _register_pending(_key, _neutral)


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


@rule("model.moe_router_topk", "model.moe_router_pre_softmax", given=(EXPERTS,))
def _top1_needs_pre_softmax(topk: int, pre_softmax: bool, experts: int | None) -> str | None:
    if experts and topk == 1 and not pre_softmax:
        return "softmax over one selected expert is always 1 and trains no router; set moe_router_pre_softmax: true"
    return None


@rule("model.moe_layer_freq", "model.num_layers")
def _layer_freq_fits(freq: int | list[int], layers: int) -> str | None:
    if isinstance(freq, list) and len(freq) != layers:
        return f"the list has {len(freq)} entries; it needs one a layer"
    return None


@rule(EXPERTS, "model.moe_first_k_dense", "model.moe_layer_freq", given=("model.is_moe",))
def _some_layer_is_moe(experts: int | None, first_dense: int, freq: int | list[int], is_moe: bool) -> str | None:
    return "no layer is left to be MoE" if experts and not is_moe else None


@rule("model.moe_router_load_balancing_type", "model.moe_aux_loss_coeff")
def _coefficient_has_a_loss(kind: str, coefficient: float) -> str | None:
    return "a coefficient without a balance loss; set the type to aux_loss" if kind == "none" and coefficient else None


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


@rule("data.sequence_length", TP, given=(SP,))
def _sp_divides_sequence(length: int, tp: int, sp: bool) -> str | None:
    return (
        "sequence parallelism needs a length that is a multiple of the tensor-parallel size"
        if sp and length % tp
        else None
    )


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
    "moe_router_topk_scaling_factor moe_shared_expert_intermediate_size moe_layer_freq moe_router_load_balancing_type "
    "moe_aux_loss_coeff tensor_model_parallel_size pipeline_model_parallel_size virtual_pipeline_model_parallel_size "
    "expert_model_parallel_size expert_tensor_parallel_size sequence_parallel moe_token_dispatcher_type "
    "recompute_granularity recompute_method recompute_num_layers recompute_modules params_dtype pipeline_dtype bf16 "
    "calculate_per_token_loss batch_p2p_comm overlap_p2p_comm perform_initialization "
    "activation_func add_bias_linear add_qkv_bias attention_dropout gated_linear_unit hidden_dropout "
    "multi_latent_attention normalization qk_layernorm".split()
)
"""TransformerConfig fields that this framework derives; an override could contradict them silently."""
