"""Qwen3, dense, with its norms of each head's queries and keys: `Qwen3ForCausalLM`."""

from megatron_ext.architectures.tables.attention_fields import Activation, Groups, HeadWidth
from megatron_ext.architectures.tables.base import Architecture
from megatron_ext.architectures.tables.experts import dense_only
from megatron_ext.architectures.tables.fields import Always, Field, Fixed
from megatron_ext.architectures.tables.llama_shape import DENSE_FFN, QK_NORMS, SIZES, TRUNK
from megatron_ext.architectures.tables.rope import Rope
from megatron_ext.architectures.tables.window_fields import SlidingWindow, after_the_first

POSITIONS = 32768

QWEN3 = Architecture(
    name="qwen3",
    hf_class="Qwen3ForCausalLM",
    model_type="qwen3",
    config=(
        *SIZES,
        Field("intermediate_size", "ffn_hidden_size"),
        Groups(default=32),
        HeadWidth(default=128),
        Field("max_position_embeddings", "max_position_embeddings", default=POSITIONS),
        Field("rms_norm_eps", "layernorm_epsilon", default=1e-6),
        Activation("hidden_act"),
        Always("qk_layernorm", "head"),
        Fixed("attention_bias", False),
        SlidingWindow(window=4096, switch="use_sliding_window", layers=after_the_first, reads_types=True),
        Rope(partial=None),
    ),
    weights=TRUNK + DENSE_FFN + QK_NORMS,
    extra_check=dense_only,
)
