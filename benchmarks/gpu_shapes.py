"""The models of benchmarks/gpu.py: a layer of each kind, and how many of them one GPU holds."""

from dataclasses import replace

from megatron_ext.canonical.counts import count_parameters
from megatron_ext.config import ModelConfig

LENGTH, MICRO_BATCH, MICRO_BATCHES = 4096, 2, 4
BYTES_OF_STATE = 18
"""A parameter in bf16, its fp32 gradient, fp32 master and two moments."""
SHARE_OF_STATE = 0.6
"""Of the memory; the rest is for activations."""
MOST_LAYERS = 8
"""More change neither TFLOP/s nor tokens/s a layer."""

LLAMA = ModelConfig(
    num_layers=1,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    vocab_size=32768,
    max_position_embeddings=LENGTH,
    rotary_base=5e5,
)
SHAPES = {
    "dense, Llama-8B layers": LLAMA,
    "MoE 8x8B": replace(LLAMA, num_moe_experts=8, moe_router_topk=2, moe_aux_loss_coeff=1e-2),
    "MoE 64 experts top-6, 2 shared": replace(
        LLAMA,
        hidden_size=2048,
        ffn_hidden_size=10944,
        num_attention_heads=16,
        num_query_groups=16,
        num_moe_experts=64,
        moe_router_topk=6,
        moe_ffn_hidden_size=1408,
        moe_shared_expert_intermediate_size=2816,
        moe_aux_loss_coeff=1e-3,
    ),
}


def tiny(model: ModelConfig) -> ModelConfig:
    """The same kind of model in a size that a CPU trains at once."""
    moe = {"moe_ffn_hidden_size": 32} if model.num_moe_experts else {}
    shared = {"moe_shared_expert_intermediate_size": 64} if model.moe_shared_expert_intermediate_size else {}
    heads = {"num_attention_heads": 4, "num_query_groups": 2, "vocab_size": 512}
    return replace(model, num_layers=2, hidden_size=64, ffn_hidden_size=96, **heads, **moe, **shared)


def with_layers_that_fit(model: ModelConfig, memory: int) -> ModelConfig:
    """`model` with as many layers as their training state leaves room for activations in `memory` bytes."""
    one, two = (count_parameters(replace(model, num_layers=n)).total for n in (1, 2))
    room = SHARE_OF_STATE * memory / BYTES_OF_STATE - (2 * one - two)
    return replace(model, num_layers=max(1, min(MOST_LAYERS, int(room // (two - one)))))
