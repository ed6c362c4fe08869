"""Qwen2 and Qwen2.5, dense: `Qwen2ForCausalLM`."""

from megatron_ext.architectures.tables.attention_fields import Activation, Groups, HeadWidth
from megatron_ext.architectures.tables.base import Architecture
from megatron_ext.architectures.tables.experts import dense_only
from megatron_ext.architectures.tables.fields import Always, Field
from megatron_ext.architectures.tables.llama_shape import DENSE_FFN, DROPS, QKV, SIZES, TRUNK
from megatron_ext.architectures.tables.rope import Rope
from megatron_ext.architectures.tables.rules import bias_of, with_qkv_biases
from megatron_ext.architectures.tables.window_fields import SlidingWindow, after_the_first

POSITIONS = 32768

QWEN2 = Architecture(
    name="qwen2",
    hf_class="Qwen2ForCausalLM",
    model_type="qwen2",
    config=(
        *SIZES,
        Field("intermediate_size", "ffn_hidden_size"),
        Groups(default=32),
        HeadWidth(declared=False),
        Field("max_position_embeddings", "max_position_embeddings", default=POSITIONS),
        Field("rms_norm_eps", "layernorm_epsilon", default=1e-6),
        Activation("hidden_act"),
        Always("add_qkv_bias", True),
        SlidingWindow(window=4096, switch="use_sliding_window", layers=after_the_first, reads_types=True),
        Rope(partial=None),
    ),
    weights=(*TRUNK, *DENSE_FFN, bias_of(QKV, with_qkv_biases)),
    extra_check=dense_only,
    drops=DROPS,
)
