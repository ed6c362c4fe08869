"""Our own `MegatronExtForCausalLM`: any model this framework can train, with the modelling code in the export."""

import torch

from megatron_ext.architectures.tables.base import Architecture
from megatron_ext.architectures.tables.fields import (
    ConfigRule,
    Field,
    Inverted,
    LayerPattern,
    Normalization,
    fields_outside,
)
from megatron_ext.architectures.tables.own_fields import Experts, Heads, Noise, SelectedSum, Spelled, Training
from megatron_ext.architectures.tables.rope import Rope
from megatron_ext.architectures.tables.rules import (
    GateUp,
    Qkv,
    Rename,
    Rule,
    Where,
    bias_of,
    everywhere,
    in_dense_layers,
    in_moe_layers,
    untied,
    with_biases,
    with_qkv_biases,
    with_shared_experts,
)
from megatron_ext.architectures.tables.window_fields import LayerWindows
from megatron_ext.config import LearnedNoise, ModelConfig

ACTIVATIONS = (
    ("silu", "silu"),
    ("gelu", "gelu"),
    ("gelu_pytorch_tanh", "gelu_tanh"),
    ("quick_gelu", "quick_gelu"),
)

_FIELDS: tuple[ConfigRule, ...] = (
    Field("vocab_size", "vocab_size"),
    Field("hidden_size", "hidden_size"),
    Field("intermediate_size", "ffn_hidden_size"),
    Field("num_hidden_layers", "num_layers"),
    Field("num_attention_heads", "num_attention_heads"),
    Heads(),
    Field("max_position_embeddings", "max_position_embeddings", default=4096),
    Spelled("norm_type", "normalization", (("rms_norm", "RMSNorm"), ("layer_norm", "LayerNorm"))),
    Field("norm_eps", "layernorm_epsilon", default=1e-5),
    Spelled("hidden_act", "activation_func", ACTIVATIONS),
    Field("gated_mlp", "gated_linear_unit", default=True),
    Field("glu_limit", "activation_func_clamp_value"),
    Field("glu_offset", "glu_linear_offset", default=0.0),
    Field("qkv_bias", "add_qkv_bias", default=False),
    Field("use_bias", "add_bias_linear", default=False),
    Field("qk_norm", "qk_layernorm"),
    LayerWindows(),
    Field("attention_sinks", "attention_sinks", default=False),
    Spelled("position_embedding_type", "position_embedding_type", (("rope", "rope"), ("learned", "learned_absolute"))),
    Rope(),
    Field("embedding_multiplier", "embedding_scale", default=1.0),
    Inverted("tie_word_embeddings", "untie_embeddings_and_output_weights"),
    Field("hidden_dropout", "hidden_dropout", default=0.0),
    Field("attention_dropout", "attention_dropout", default=0.0),
    Field("initializer_range", "init_method_std", default=0.02),
    Experts(),
    Field("num_experts_per_tok", "moe_router_topk", default=2),
    Field("moe_intermediate_size", "moe_ffn_hidden_size"),
    LayerPattern("moe_layer_pattern"),
    Field("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"),
    Field("shared_expert_gate", "moe_shared_expert_gate", default=False),
    Field("scoring_func", "moe_router_score_function", default="softmax"),
    Field("softmax_before_topk", "moe_router_pre_softmax", default=False),
    SelectedSum(),
    Field("routed_scaling_factor", "moe_router_topk_scaling_factor"),
    Field("n_group", "moe_router_num_groups"),
    Field("topk_group", "moe_router_group_topk"),
    Field("group_score", "moe_router_group_score", default="top2_sum"),
    Field("router_bias", "moe_router_linear_bias", default=False),
    Field("expert_bias", "moe_router_enable_expert_bias", default=False),
    Normalization("gating_normalization"),
    Noise(),
)
# Nothing of training is lost: what has no field of its own in Hugging Face travels in one mapping.
CONFIG: tuple[ConfigRule, ...] = (*_FIELDS, Training("megatron_training", fields_outside(_FIELDS)))


def both(*conditions: Where) -> Where:
    """Where all conditions hold."""
    return lambda model, layer: all(condition(model, layer) for condition in conditions)


def gated(model: ModelConfig, layer: int) -> bool:
    """Feed-forward networks with a gate projection."""
    return model.gated_linear_unit


def plain(model: ModelConfig, layer: int) -> bool:
    """Feed-forward networks without a gate projection."""
    return not model.gated_linear_unit


def layer_norms(model: ModelConfig, layer: int) -> bool:
    """Norms with a bias."""
    return model.normalization == "LayerNorm"


def learned_positions(model: ModelConfig, layer: int) -> bool:
    """A vector for each position."""
    return model.position_embedding_type == "learned_absolute"


def grouped_query(model: ModelConfig, layer: int) -> bool:
    """Ordinary attention."""
    return model.multi_latent_attention is None


def qk_norms(model: ModelConfig, layer: int) -> bool:
    """Norms of queries and keys."""
    return model.qk_layernorm is not None


def sinks(model: ModelConfig, layer: int) -> bool:
    """A sink for each head."""
    return model.attention_sinks


def latent(model: ModelConfig, layer: int) -> bool:
    """Multi-head latent attention."""
    return model.multi_latent_attention is not None


def latent_queries(model: ModelConfig, layer: int) -> bool:
    """Latent attention whose queries come from a latent vector."""
    return model.multi_latent_attention is not None and model.multi_latent_attention.q_lora_rank is not None


def direct_queries(model: ModelConfig, layer: int) -> bool:
    """Latent attention whose queries are projected directly."""
    return latent(model, layer) and not latent_queries(model, layer)


def _linear(megatron: str, hf: str, where: Where) -> tuple[Rule, ...]:
    """One linear layer on both sides, with its bias where there are biases."""
    weight = Rename(f"{megatron}.weight", where, hf=f"{hf}.weight")
    return weight, bias_of(weight, both(where, with_biases))


def _norm(megatron: str, hf: str, where: Where = everywhere) -> tuple[Rule, ...]:
    """One norm on both sides."""
    weight = Rename(f"{megatron}.weight", where, hf=f"{hf}.weight")
    return weight, bias_of(weight, both(where, layer_norms))


def _feed_forward(megatron: str, hf: str, where: Where) -> tuple[Rule, ...]:
    """One feed-forward network, gated or not."""
    gate, up, down = (f"{hf}.{name}_proj" for name in ("gate", "up", "down"))
    fc1 = GateUp(f"{megatron}.linear_fc1.weight", both(where, gated), gate=f"{gate}.weight", up=f"{up}.weight")
    return (
        fc1,
        bias_of(fc1, both(where, gated, with_biases)),
        *_linear(f"{megatron}.linear_fc1", up, both(where, plain)),
        *_linear(f"{megatron}.linear_fc2", down, where),
    )


LAYER, HF_LAYER = "decoder.layers.{layer}", "model.layers.{layer}"
ATTENTION, HF_ATTENTION = f"{LAYER}.self_attention", f"{HF_LAYER}.self_attn"
MLP, HF_MLP = f"{LAYER}.mlp", f"{HF_LAYER}.mlp"

EMBEDDINGS: tuple[Rule, ...] = (
    Rename("embedding.word_embeddings.weight", hf="model.embed_tokens.weight", vocab=True),
    Rename("embedding.position_embeddings.weight", learned_positions, hf="model.embed_positions.weight"),
    *_norm("decoder.final_layernorm", "model.norm"),
    Rename("output_layer.weight", untied, hf="lm_head.weight", vocab=True),
)

QKV = Qkv(
    f"{ATTENTION}.linear_qkv.weight",
    grouped_query,
    q=f"{HF_ATTENTION}.q_proj.weight",
    k=f"{HF_ATTENTION}.k_proj.weight",
    v=f"{HF_ATTENTION}.v_proj.weight",
)

GROUPED_QUERY_ATTENTION: tuple[Rule, ...] = (
    QKV,
    bias_of(QKV, with_qkv_biases),
    Rename(f"{ATTENTION}.core_attention.softmax_offset", sinks, hf=f"{HF_ATTENTION}.sinks"),
    *_norm(f"{ATTENTION}.q_layernorm", f"{HF_ATTENTION}.q_norm", qk_norms),
    *_norm(f"{ATTENTION}.k_layernorm", f"{HF_ATTENTION}.k_norm", qk_norms),
)

LATENT_ATTENTION: tuple[Rule, ...] = (
    Rename(f"{ATTENTION}.linear_q_proj.weight", direct_queries, hf=f"{HF_ATTENTION}.q_proj.weight"),
    Rename(f"{ATTENTION}.linear_q_down_proj.weight", latent_queries, hf=f"{HF_ATTENTION}.q_a_proj.weight"),
    *_norm(f"{ATTENTION}.q_layernorm", f"{HF_ATTENTION}.q_a_layernorm", latent_queries),
    Rename(f"{ATTENTION}.linear_q_up_proj.weight", latent_queries, hf=f"{HF_ATTENTION}.q_b_proj.weight"),
    Rename(f"{ATTENTION}.linear_kv_down_proj.weight", latent, hf=f"{HF_ATTENTION}.kv_a_proj_with_mqa.weight"),
    *_norm(f"{ATTENTION}.kv_layernorm", f"{HF_ATTENTION}.kv_a_layernorm", latent),
    Rename(f"{ATTENTION}.linear_kv_up_proj.weight", latent, hf=f"{HF_ATTENTION}.kv_b_proj.weight"),
)

ROUTER: tuple[Rule, ...] = (
    Rename(f"{MLP}.router.weight", in_moe_layers, hf=f"{HF_MLP}.gate.weight"),
    Rename(
        f"{MLP}.router.bias",
        both(in_moe_layers, lambda model, layer: model.moe_router_linear_bias),
        hf=f"{HF_MLP}.gate.bias",
    ),
    Rename(
        f"{MLP}.router.expert_bias",
        both(in_moe_layers, lambda model, layer: model.moe_router_enable_expert_bias),
        torch.float32,
        hf=f"{HF_MLP}.gate.e_score_correction_bias",
    ),
    Rename(
        f"{MLP}.router.noise_weight",
        both(in_moe_layers, lambda model, layer: isinstance(model.moe_router_noise, LearnedNoise)),
        hf=f"{HF_MLP}.gate.noise_weight",
    ),
    Rename(
        f"{MLP}.shared_experts.gate_weight",
        both(in_moe_layers, lambda model, layer: model.moe_shared_expert_gate),
        hf=f"{HF_MLP}.shared_expert_gate.weight",
    ),
)

LAYERS: tuple[Rule, ...] = (
    *_norm(f"{LAYER}.input_layernorm", f"{HF_LAYER}.input_layernorm"),
    *GROUPED_QUERY_ATTENTION,
    *LATENT_ATTENTION,
    *_linear(f"{ATTENTION}.linear_proj", f"{HF_ATTENTION}.o_proj", everywhere),
    *_norm(f"{LAYER}.pre_mlp_layernorm", f"{HF_LAYER}.post_attention_layernorm"),
    *_feed_forward(MLP, HF_MLP, in_dense_layers),
    *ROUTER,
    *_feed_forward(f"{MLP}.experts.{{expert}}", f"{HF_MLP}.experts.{{expert}}", in_moe_layers),
    *_feed_forward(f"{MLP}.shared_experts", f"{HF_MLP}.shared_expert", with_shared_experts),
)

MEGATRON_EXT = Architecture(
    name="megatron_ext",
    hf_class="MegatronExtForCausalLM",
    model_type="megatron_ext",
    config=CONFIG,
    weights=EMBEDDINGS + LAYERS,
    # A field that this version does not know may be of a newer one, whose code reads it.
    reads=None,
    code=(
        "configuration_megatron_ext.py",
        "modeling_megatron_ext.py",
        "modeling_megatron_ext_attention.py",
        "modeling_megatron_ext_moe.py",
    ),
    auto_map=(
        ("AutoConfig", "configuration_megatron_ext.MegatronExtConfig"),
        ("AutoModel", "modeling_megatron_ext.MegatronExtModel"),
        ("AutoModelForCausalLM", "modeling_megatron_ext.MegatronExtForCausalLM"),
    ),
)
