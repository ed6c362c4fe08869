"""Llama and every model of its shape: `LlamaForCausalLM`."""

from megatron_ext.architectures.tables.attention_fields import Activation, Groups, HeadWidth, LinearBiases
from megatron_ext.architectures.tables.base import Architecture
from megatron_ext.architectures.tables.experts import dense_only
from megatron_ext.architectures.tables.fields import Field
from megatron_ext.architectures.tables.llama_shape import DENSE_FFN, DROPS, PROJECTION, QKV, SIZES, TRUNK
from megatron_ext.architectures.tables.rope import Rope
from megatron_ext.architectures.tables.rules import bias_of, with_biases

LLAMA = Architecture(
    name="llama",
    hf_class="LlamaForCausalLM",
    model_type="llama",
    config=(
        *SIZES,
        Field("intermediate_size", "ffn_hidden_size"),
        Groups(),
        HeadWidth("divides"),
        Field("max_position_embeddings", "max_position_embeddings", default=2048),
        Field("rms_norm_eps", "layernorm_epsilon", default=1e-6),
        Rope(partial=None),
        Activation("hidden_act"),
        LinearBiases(),
    ),
    weights=(*TRUNK, *DENSE_FFN, *(bias_of(rule, with_biases) for rule in (QKV, PROJECTION, *DENSE_FFN))),
    extra_check=dense_only,
    drops=DROPS,
)
