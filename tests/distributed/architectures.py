"""Small models with the features of the field's architectures."""

from dataclasses import replace
from typing import Any

from megatron_ext.config import (
    GatingNormalization,
    Llama3RopeScaling,
    ModelConfig,
    MultiLatentAttention,
    YarnRopeScaling,
)
from megatron_ext.testing.tiny import tiny_model

# Large weights, so that attention is far from uniform and what is wrong in it shows.
SMALL: dict[str, Any] = {"num_layers": 2, "init_method_std": 0.1}
EXPERTS: dict[str, Any] = {
    **SMALL,
    "num_moe_experts": 4,
    "moe_ffn_hidden_size": 48,
    "moe_first_k_dense": 1,
    "moe_aux_loss_coeff": 1e-2,
    "moe_shared_expert_intermediate_size": 64,
}
LATENT = MultiLatentAttention(kv_lora_rank=24, q_lora_rank=40, qk_head_dim=16, qk_pos_emb_head_dim=8, v_head_dim=12)
YARN = YarnRopeScaling(kind="yarn", factor=4.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=0.7)

MODELS: dict[str, ModelConfig] = {
    "gpt2-moe": tiny_model(
        **EXPERTS,
        moe_gating_normalization=GatingNormalization(),
        position_embedding_type="learned_absolute",
        normalization="LayerNorm",
        activation_func="gelu_tanh",
        gated_linear_unit=False,
        add_bias_linear=True,
        untie_embeddings_and_output_weights=False,
        output_z_loss_coeff=1e-2,
    ),
    "qwen3": tiny_model(
        **SMALL,
        qk_layernorm="head",
        add_qkv_bias=True,
        rope_scaling=Llama3RopeScaling(kind="llama3", factor=4.0, original_max_position_embeddings=16),
        rotary_percent=0.5,
        embedding_scale=8.0,
        sliding_window=5,
        output_z_loss_coeff=1e-2,
    ),
    "olmoe": tiny_model(
        **EXPERTS,
        qk_layernorm="projection",
        add_bias_linear=True,
        sliding_window=11,
        window_attn_skip_freq=2,
        attention_sinks=True,
        activation_func="quick_gelu",
        activation_func_clamp_value=0.5,
        glu_linear_offset=1.0,
        moe_router_linear_bias=True,
    ),
    "deepseek": tiny_model(
        **EXPERTS, num_query_groups=None, multi_latent_attention=LATENT, rope_scaling=YARN, output_z_loss_coeff=1e-2
    ),
    "dense deepseek": tiny_model(
        **SMALL,
        num_query_groups=None,
        multi_latent_attention=replace(LATENT, q_lora_rank=None),
        normalization="LayerNorm",
    ),
}
