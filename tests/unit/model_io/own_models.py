"""Small models that together use everything a model configuration can say, and their exports as our own class."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from megatron_ext.canonical.catalogue import model_shapes
from megatron_ext.checkpoint.streams import MegatronSink, TensorSpec
from megatron_ext.config import (
    AdaptiveAuxLoss,
    DynamicRopeScaling,
    GatingNormalization,
    GumbelNoise,
    InputJitter,
    LearnedNoise,
    LinearRopeScaling,
    Llama3RopeScaling,
    ModelConfig,
    MultiLatentAttention,
    YarnRopeScaling,
    to_mapping,
)
from megatron_ext.model_io.convert import convert

VOCABULARY, LENGTH = 203, 24
# Other kernels and other shapes sum in another order; measured up to 4e-6 of the logits' scale.
TOLERANCE = 2e-5


def small(**changes: Any) -> ModelConfig:
    """Odd sizes: six heads of ten in three groups, a vocabulary that needs padding."""
    fields: dict[str, Any] = {
        "num_layers": 3,
        "hidden_size": 60,
        "ffn_hidden_size": 88,
        "num_attention_heads": 6,
        "vocab_size": VOCABULARY,
        "make_vocab_size_divisible_by": 4,
        "max_position_embeddings": 40,
    }
    return ModelConfig(**(fields | changes))


def latent(q_lora_rank: int | None) -> MultiLatentAttention:
    """Latent attention whose values are narrower than its keys."""
    return MultiLatentAttention(
        kv_lora_rank=22, q_lora_rank=q_lora_rank, qk_head_dim=14, qk_pos_emb_head_dim=6, v_head_dim=11
    )


MODELS = {
    "GPT-2 with experts": small(
        position_embedding_type="learned_absolute",
        normalization="LayerNorm",
        activation_func="gelu_tanh",
        gated_linear_unit=False,
        add_bias_linear=True,
        untie_embeddings_and_output_weights=False,
        attention_dropout=0.1,
        hidden_dropout=0.1,
        init_method_std=0.03,
        num_moe_experts=5,
        moe_layer_freq=2,
        moe_router_noise=GumbelNoise(kind="gumbel", scale=0.5),
        moe_expert_capacity_factor=1.25,
        moe_token_drop_policy="position",
        moe_pad_expert_input_to_capacity=True,
        moe_router_load_balancing_type=["aux_loss", "global_aux_loss"],
        moe_aux_loss_coeff=[1e-3, 1e-2],
        moe_z_loss_coeff=1e-3,
        output_z_loss_coeff=1e-4,
    ),
    "Tanuki with a shared expert": small(
        num_query_groups=3,
        rotary_base=5e5,
        num_moe_experts=7,
        moe_ffn_hidden_size=30,
        moe_first_k_dense=1,
        moe_shared_expert_intermediate_size=50,
        moe_gating_normalization=GatingNormalization(),
        moe_aux_loss_coeff=1e-2,
        moe_adaptive_aux_loss=AdaptiveAuxLoss(),
    ),
    "DeepSeek-V3 with normalized gating": small(
        multi_latent_attention=latent(q_lora_rank=26),
        num_moe_experts=9,
        moe_ffn_hidden_size=20,
        moe_first_k_dense=1,
        moe_shared_expert_intermediate_size=40,
        moe_router_topk=4,
        moe_router_score_function="sigmoid",
        moe_router_topk_scaling_factor=2.5,
        moe_router_num_groups=3,
        moe_router_group_topk=2,
        moe_router_enable_expert_bias=True,
        moe_router_bias_update_rate=2e-3,
        moe_gating_normalization=GatingNormalization(scale=2.0, eps=1e-3, correction=0),
    ),
    "DeepSeek-V2 with LayerNorm": small(
        multi_latent_attention=latent(q_lora_rank=None),
        normalization="LayerNorm",
        layernorm_epsilon=1e-4,
        num_moe_experts=8,
        moe_ffn_hidden_size=20,
        moe_router_topk=3,
        moe_router_pre_softmax=True,
        moe_router_topk_scaling_factor=1.7,
        moe_router_num_groups=4,
        moe_router_group_topk=2,
        moe_router_group_score="max",
        moe_layer_freq=[0, 1, 1],
    ),
    "Qwen2-MoE with learned noise": small(
        sliding_window=7,
        window_attn_skip_freq=[0, 1, 1],
        num_query_groups=2,
        add_qkv_bias=True,
        num_moe_experts=5,
        moe_ffn_hidden_size=30,
        moe_router_pre_softmax=True,
        moe_shared_expert_intermediate_size=50,
        moe_shared_expert_gate=True,
        moe_router_noise=LearnedNoise(kind="learned"),
    ),
    "Qwen3-MoE with a shared expert": small(
        num_query_groups=2,
        kv_channels=14,
        qk_layernorm="head",
        num_moe_experts=6,
        moe_ffn_hidden_size=30,
        moe_router_topk=3,
        moe_router_pre_softmax=True,
        moe_router_norm_topk_prob=True,
        moe_shared_expert_intermediate_size=18,
        moe_router_noise=InputJitter(kind="input_jitter", eps=0.05),
    ),
    "OLMoE with biases": small(
        sliding_window=5,
        window_attn_skip_freq=2,
        attention_sinks=True,
        num_query_groups=3,
        qk_layernorm="projection",
        activation_func="gelu",
        add_bias_linear=True,
        num_moe_experts=5,
        moe_router_topk=3,
        moe_shared_expert_intermediate_size=18,
        moe_shared_expert_gate=True,
    ),
    "gpt-oss with a shared expert and dense layers": small(
        num_query_groups=3,
        kv_channels=14,
        activation_func="quick_gelu",
        activation_func_clamp_value=0.6,
        glu_linear_offset=1.0,
        add_bias_linear=True,
        num_moe_experts=5,
        moe_ffn_hidden_size=30,
        moe_first_k_dense=1,
        moe_router_linear_bias=True,
        moe_shared_expert_intermediate_size=18,
    ),
    "top-1 sigmoid": small(
        embedding_scale=7.5,
        qk_layernorm="head",
        normalization="LayerNorm",
        num_moe_experts=4,
        moe_router_topk=1,
        moe_router_score_function="sigmoid",
    ),
    "sigmoid without normalization": small(
        num_moe_experts=5,
        moe_router_topk=3,
        moe_router_score_function="sigmoid",
        moe_router_norm_topk_prob=False,
        moe_gating_normalization=GatingNormalization(scale=0.5),
    ),
    "dense": small(
        num_query_groups=3,
        embedding_scale=60**0.5,
        activation_func="gelu",
        normalization="LayerNorm",
        gated_linear_unit=False,
    ),
}

_YARN = YarnRopeScaling(kind="yarn", factor=4.0, original_max_position_embeddings=10)
# From dimension 1.3 to 2.8, which rounded would be 1 and 3.
_BETWEEN_DIMENSIONS = replace(_YARN, truncate=False, beta_fast=0.05, beta_slow=0.001)
_DEEPSEEK_YARN = replace(_YARN, mscale=0.7, mscale_all_dim=0.9, beta_fast=8.0, beta_slow=2.0)
_SCALED = {
    "linear": ("dense", {"rope_scaling": LinearRopeScaling(kind="linear", factor=4.0)}),
    "dynamic": (
        "dense",
        {"rope_scaling": DynamicRopeScaling(kind="dynamic", factor=4.0), "max_position_embeddings": 16},
    ),
    "llama3": (
        "Tanuki with a shared expert",
        {"rope_scaling": Llama3RopeScaling(kind="llama3", factor=8.0, original_max_position_embeddings=10)},
    ),
    "yarn": ("Tanuki with a shared expert", {"rope_scaling": _BETWEEN_DIMENSIONS}),
    "yarn, latent": ("DeepSeek-V3 with normalized gating", {"rope_scaling": _YARN}),
    "yarn, latent, DeepSeek's factors": ("DeepSeek-V3 with normalized gating", {"rope_scaling": _DEEPSEEK_YARN}),
    "yarn, DeepSeek's factors": ("dense", {"rope_scaling": _DEEPSEEK_YARN}),
    "partial": ("dense", {"rotary_percent": 0.4}),
}
SCALED = {variant: replace(MODELS[name], **changes) for variant, (name, changes) in _SCALED.items()}
"""Some of MODELS with every kind of rotary embedding."""
MODELS |= SCALED


def write_checkpoint(directory: Path, model: ModelConfig) -> Path:
    """A Megatron checkpoint with random weights at which every feature shows: no bias is 0, no norm is 1."""
    generator = torch.Generator().manual_seed(5)
    specs = {name: TensorSpec(shape, torch.float32) for name, shape in model_shapes(model).items()}
    with MegatronSink(directory, specs, {"model": to_mapping(model)}) as sink:
        for name, spec in specs.items():
            offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            sink.write(name, torch.randn(spec.shape, generator=generator) * 0.2 + offset)
    return directory


def export(directory: Path, name: str) -> tuple[Path, Path]:
    """One of MODELS as a Megatron checkpoint and as a Hugging Face directory of our own class."""
    source = write_checkpoint(directory / "megatron", MODELS[name])
    convert(source, directory / "hf", hf_class="MegatronExtForCausalLM")
    return source, directory / "hf"


def tokens(rows: int = 2, length: int = LENGTH, seed: int = 1) -> torch.Tensor:
    """Random token ids [rows, length]."""
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def load(directory: Path, **options: Any) -> Any:
    """An export as transformers opens it, in fp32."""
    options = {"dtype": torch.float32, "trust_remote_code": True} | options
    return AutoModelForCausalLM.from_pretrained(directory, **options).eval()


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, of the scale of `b`."""
    return float((a - b).abs().max() / b.abs().max())


def left_padded(rows: torch.Tensor, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row cut to its length and filled up on the left with token 7, and the mask of what is no padding."""
    batch, mask = torch.full_like(rows, 7), torch.zeros_like(rows)
    for row, length in enumerate(lengths):
        batch[row, -length:] = rows[row, :length]
        mask[row, -length:] = 1
    return batch, mask
