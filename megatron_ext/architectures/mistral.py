"""Mistral, whose first version has a sliding window: `MistralForCausalLM`."""

from megatron_ext.architectures.tables.attention_fields import Activation, Groups, HeadWidth
from megatron_ext.architectures.tables.base import Architecture
from megatron_ext.architectures.tables.experts import dense_only
from megatron_ext.architectures.tables.fields import Field
from megatron_ext.architectures.tables.llama_shape import DENSE_FFN, DROPS, SIZES, TRUNK
from megatron_ext.architectures.tables.rope import Rope
from megatron_ext.architectures.tables.window_fields import SlidingWindow

POSITIONS = 131072

MISTRAL = Architecture(
    name="mistral",
    hf_class="MistralForCausalLM",
    model_type="mistral",
    config=(
        *SIZES,
        Field("intermediate_size", "ffn_hidden_size"),
        Groups(default=8),
        HeadWidth(),
        Field("max_position_embeddings", "max_position_embeddings", default=POSITIONS),
        Field("rms_norm_eps", "layernorm_epsilon", default=1e-6),
        Activation("hidden_act"),
        SlidingWindow(window=4096),
        Rope(partial=None),
    ),
    weights=TRUNK + DENSE_FFN,
    extra_check=dense_only,
    drops=DROPS,
)
