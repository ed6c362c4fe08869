"""Rules between the keys of a model's architecture: positions, attention, norms, biases."""

from typing import Any

from megatron_ext.config.rules.registry import EXPERTS, GROUPS, HEADS, MLA, rule

POSITIONS = "model.position_embedding_type"


@rule("model.rotary_width", "model.head_dim", "model.rotary_percent", given=(POSITIONS,))
def _rotates_pairs(width: int, head_dim: int, percent: float, positions: str) -> str | None:
    if positions == "rope" and (width < 2 or width % 2):
        return "rotary embedding turns pairs of dimensions: head_dim x rotary_percent must be even and at least 2"
    return None


def _register_rope_only(key: str, neutral: Any) -> None:
    @rule(key, POSITIONS)
    def _needs_rope(value: Any, positions: str) -> str | None:
        if positions != "rope" and value != neutral:
            return "only rotary embedding has that; remove the key, or set position_embedding_type: rope"
        return None


for _key, _neutral in {"model.rotary_percent": 1.0, "model.rope_scaling": None, MLA: None}.items():
    _register_rope_only(_key, _neutral)


def _register_not_latent(key: str, neutral: Any, reason: str) -> None:
    @rule(key, given=(MLA,))
    def _not_with_latent_attention(value: Any, latent: Any) -> str | None:
        return (
            f"with multi_latent_attention {reason}; remove the key" if latent is not None and value != neutral else None
        )


for _key, (_neutral, _reason) in {
    GROUPS: (None, "every head has keys and values of its own"),
    "model.kv_channels": (None, "the head widths are qk_head_dim, qk_pos_emb_head_dim and v_head_dim"),
    "model.rotary_percent": (1.0, "the rotated width is qk_pos_emb_head_dim"),
    "model.qk_layernorm": (None, "the latent vectors have norms already"),
    "model.sliding_window": (None, "every layer attends to all tokens before it"),
    "model.attention_sinks": (False, "no head has a sink"),
    "model.add_bias_linear": (False, "linear layers have no biases"),
    "model.add_qkv_bias": (False, "linear layers have no biases"),
}.items():
    _register_not_latent(_key, _neutral, _reason)


@rule("model.window_attn_skip_freq", "model.sliding_window", given=("model.num_layers",))
def _layers_without_window(skip: int | list[int] | None, window: int | None, layers: int) -> str | None:
    if skip is not None and window is None:
        return "no layer has a window to leave out; set sliding_window, or remove window_attn_skip_freq"
    if isinstance(skip, list) and len(skip) != layers:
        return f"a list needs one entry a layer, 1 with the window and 0 without it: {layers}"
    return None


@rule("model.attention_sinks", "model.attention_dropout")
def _sinks_are_not_dropped(sinks: bool, dropout: float) -> str | None:
    return "no kernel drops weights of a softmax with a sink; set attention_dropout: 0" if sinks and dropout else None


@rule("model.qk_layernorm", "model.normalization")
def _projection_norm_is_rms(kind: str | None, normalization: str) -> str | None:
    if kind == "projection" and normalization != "RMSNorm":
        return (
            "the norm over a whole projection is an RMSNorm (OLMoE); set qk_layernorm: head or normalization: RMSNorm"
        )
    return None


def _register_gated_only(key: str, neutral: Any) -> None:
    @rule(key, "model.gated_linear_unit")
    def _needs_a_gate(value: Any, gated: bool) -> str | None:
        return None if gated or value == neutral else "only a gated network has that; remove it"


_OF_A_GATE = {"model.activation_func_clamp_value": None, "model.glu_linear_offset": 0.0}
for _key, _neutral in _OF_A_GATE.items():
    _register_gated_only(_key, _neutral)


@rule("model.rope_scaling.low_freq_factor", "model.rope_scaling.high_freq_factor")
def _llama3_band_has_a_width(low: float, high: float) -> str | None:
    return "the high-frequency factor must be above the low one" if high <= low else None


@rule("model.rope_scaling.beta_slow", "model.rope_scaling.beta_fast")
def _yarn_band_has_a_width(slow: float, fast: float) -> str | None:
    return "beta_fast must be above beta_slow" if fast <= slow else None


@rule("model.rope_scaling", "model.rotary_width")
def _dynamic_scaling_has_two_pairs(scaling: Any, width: int) -> str | None:
    if scaling is not None and scaling.kind == "dynamic" and width <= 2:
        return "dynamic scaling needs more than one pair of rotated dimensions"
    return None


@rule("model.add_bias_linear", "model.hidden_size", "parallel.etp", given=(EXPERTS,))
def _etp_divides_expert_biases(biases: bool, hidden: int, etp: int, experts: int | None) -> str | None:
    if experts and biases and hidden % etp:
        return "the experts' output biases are split: hidden_size must be a multiple of the expert-tensor-parallel size"
    return None


def _register_forgotten_by_overlap(key: str, neutral: Any) -> None:
    @rule("parallel.moe_shared_expert_overlap", key)
    def _overlap_forgets(overlap: bool, value: Any) -> str | None:
        if overlap and value != neutral:
            return "overlapped shared experts leave this out in megatron-core; remove moe_shared_expert_overlap"
        return None


for _key, _neutral in {"model.add_bias_linear": False, **_OF_A_GATE}.items():
    _register_forgotten_by_overlap(_key, _neutral)


@rule(HEADS, GROUPS)
def _groups_divide_heads(heads: int, groups: int | None) -> str | None:
    return "heads must be a multiple of query groups" if groups and heads % groups else None


@rule("model.hidden_size", HEADS, given=("model.kv_channels", MLA))
def _heads_divide_hidden(hidden: int, heads: int, kv_channels: int | None, latent: Any) -> str | None:
    if kv_channels is None and latent is None and hidden % heads:
        return "hidden size must be a multiple of heads unless model.kv_channels is set"
    return None
