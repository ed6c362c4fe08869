"""What the model is: the architecture, in Megatron's field names, without anything about how it is trained or split.

`model:` in YAML is flat. Here its fields stand by what they are about: any model (this file), experts (experts.py), and
what only training reads (model_training.py).
"""

import math
from typing import Annotated, Any, Literal

from pydantic import Field

from megatron_ext.config.attention import DynamicRopeScaling, MultiLatentAttention, RopeScaling
from megatron_ext.config.base import config
from megatron_ext.config.effect import shapes_function, shapes_weights
from megatron_ext.config.experts import ExpertFields
from megatron_ext.config.model_training import DenseTraining, ExpertTraining
from megatron_ext.config.transformer_overrides import TRAINING_ONLY


@config
class DenseFields:
    """What any model is."""

    num_layers: int = shapes_weights(ge=1, le=100_000)
    """Transformer layers."""
    hidden_size: int = shapes_weights(ge=1)
    """Width of the residual stream."""
    ffn_hidden_size: int = shapes_weights(ge=1)
    """Intermediate width of a dense feed-forward layer."""
    num_attention_heads: int = shapes_weights(ge=1)
    """Query heads."""
    vocab_size: int = shapes_weights(ge=1)
    """Tokens the tokenizer knows. The embedding is padded to a multiple of `make_vocab_size_divisible_by`."""
    num_query_groups: int | None = shapes_weights(default=None, ge=1)
    """Key/value heads (grouped-query attention). Default: as many as query heads."""
    kv_channels: int | None = shapes_weights(default=None, ge=1)
    """Width of one head. Default: hidden_size / num_attention_heads."""
    max_position_embeddings: int = shapes_weights(default=4096, ge=1)
    """Longest sequence the model is declared for; exported to Hugging Face."""
    position_embedding_type: Literal["rope", "learned_absolute"] = shapes_weights(default="rope")
    """rope: rotary. learned_absolute: one learned vector a position, added to the embedding (GPT-2)."""
    rotary_base: float = shapes_function(default=10000.0, gt=0)
    """RoPE theta."""
    rotary_percent: float = shapes_function(default=1.0, gt=0, le=1)
    """Share of a head's width that is rotated (GPT-NeoX)."""
    rope_scaling: RopeScaling | None = shapes_function(default=None)
    """Extension of RoPE beyond the length the model was first trained for."""
    multi_latent_attention: MultiLatentAttention | None = shapes_weights(default=None)
    """Multi-head latent attention (DeepSeek-V2 and V3) instead of grouped-query attention."""
    sliding_window: int | None = shapes_function(default=None, ge=1)
    """Positions that a query attends to, its own and those before it (Mistral, arXiv 2310.06825). Unset: all."""
    window_attn_skip_freq: Annotated[int, Field(ge=1)] | list[Literal[0, 1]] | None = shapes_function(default=None)
    """Which layers have no window: N leaves it out of each N-th one (gpt-oss: 2), a list says 1 for every layer with
    it and 0 for the others. Unset: all layers have it."""
    attention_sinks: bool = shapes_weights(default=False)
    """A learned logit of each head joins the softmax and has no value, so that a head may attend to nothing (gpt-oss,
    arXiv 2508.10925, section 2.3)."""
    qk_layernorm: Literal["head", "projection"] | None = shapes_weights(default=None)
    """Norm of queries and keys: `head` over each head's width (Qwen3), `projection` over all heads (OLMoE)."""
    normalization: Literal["RMSNorm", "LayerNorm"] = shapes_weights(default="RMSNorm")
    """Kind of every norm."""
    layernorm_epsilon: float = shapes_function(default=1e-5, gt=0)
    """Epsilon of every norm."""
    activation_func: Literal["silu", "gelu", "gelu_tanh", "quick_gelu"] = shapes_function(default="silu")
    """Activation of feed-forward networks; gelu_tanh is the approximation of GPT-2 (gelu_new), quick_gelu the coarser
    one x sigmoid(1.702 x)."""
    gated_linear_unit: bool = shapes_weights(default=True)
    """Feed-forward networks multiply the activated projection by a second one (SwiGLU, GeGLU)."""
    activation_func_clamp_value: float | None = shapes_function(default=None, gt=0)
    """The gate is cut off above this, and the second projection beyond it on both sides (gpt-oss: swiglu_limit, 7)."""
    glu_linear_offset: float = shapes_function(default=0.0)
    """Added to the second projection of a gated network (gpt-oss: 1)."""
    add_bias_linear: bool = shapes_weights(default=False)
    """Biases in every linear layer of attention and feed-forward networks, routed experts included."""
    add_qkv_bias: bool = shapes_weights(default=False)
    """Biases in the query, key and value projections (Qwen2); implied by add_bias_linear."""
    embedding_scale: float = shapes_function(default=1.0, gt=0)
    """Factor on the token embedding (Gemma: sqrt(hidden_size))."""
    untie_embeddings_and_output_weights: bool = shapes_weights(default=True)
    """False: the output layer uses the input embedding's weights."""
    make_vocab_size_divisible_by: int = shapes_weights(logits=False, default=128, ge=1)
    """The padded vocabulary is a multiple of this, whatever the tensor-parallel size, so that layouts can change."""


# Of several bases dataclasses take the fields of the last one first.
@config
class ModelConfig(ExpertTraining, DenseTraining, ExpertFields, DenseFields):
    """A decoder-only transformer, dense or Mixture-of-Experts. The defaults are Llama's shape."""

    transformer_overrides: dict[str, Any] = shapes_function(default_factory=dict)
    """Escape hatch: fields of megatron.core's TransformerConfig set as they are, checked against its names."""

    @property
    def function_overrides(self) -> dict[str, Any]:
        """The overrides that may change what a trained model computes."""
        return {name: value for name, value in self.transformer_overrides.items() if name not in TRAINING_ONLY}

    @property
    def is_moe(self) -> bool:
        """Whether any layer has routed experts."""
        return self.num_moe_experts is not None and any(self.moe_layer_pattern)

    @property
    def moe_layer_pattern(self) -> list[bool]:
        """For each layer, whether it is MoE."""
        if self.num_moe_experts is None:
            return [False] * self.num_layers
        if isinstance(self.moe_layer_freq, list):
            pattern = [bool(x) for x in self.moe_layer_freq]
        else:
            pattern = [layer % self.moe_layer_freq == 0 for layer in range(self.num_layers)]
        return [moe and layer >= self.moe_first_k_dense for layer, moe in enumerate(pattern)]

    @property
    def window_layer_pattern(self) -> list[bool]:
        """For each layer, whether its attention has the window."""
        skip = self.window_attn_skip_freq
        if self.sliding_window is None or skip is None:
            return [self.sliding_window is not None] * self.num_layers
        if isinstance(skip, list):
            return [bool(x) for x in skip]
        return [layer % skip != 0 for layer in range(1, self.num_layers + 1)]

    @property
    def query_groups(self) -> int:
        """Key/value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """Width of one attention head's query and key."""
        if self.multi_latent_attention is not None:
            return self.multi_latent_attention.qk_head_dim + self.multi_latent_attention.qk_pos_emb_head_dim
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def latent_norm_epsilon(self) -> float:
        """Epsilon of the norms of latent vectors."""
        stated = None if self.multi_latent_attention is None else self.multi_latent_attention.latent_norm_epsilon
        return self.layernorm_epsilon if stated is None else stated

    @property
    def rotary_width(self) -> int:
        """Width of the part of a head's query and key that is rotated."""
        if self.multi_latent_attention is not None:
            return self.multi_latent_attention.qk_pos_emb_head_dim
        return int(self.head_dim * self.rotary_percent)

    @property
    def length_shapes_model(self) -> bool:
        """Whether `max_position_embeddings` is part of what the model computes, and not only declared."""
        return self.position_embedding_type == "learned_absolute" or isinstance(self.rope_scaling, DynamicRopeScaling)

    @property
    def normalizes_topk(self) -> bool:
        """Whether the selected experts' scores are divided by their sum."""
        if self.moe_router_norm_topk_prob is None:
            return self.moe_router_score_function == "sigmoid" and self.moe_router_topk > 1
        return self.moe_router_norm_topk_prob

    @property
    def has_qkv_bias(self) -> bool:
        """Whether query, key and value projections have biases."""
        return self.add_qkv_bias or self.add_bias_linear

    @property
    def has_dense_layers(self) -> bool:
        """Whether any layer has a dense feed-forward network."""
        return not all(self.moe_layer_pattern)

    @property
    def expert_ffn_hidden_size(self) -> int:
        """Intermediate width of one routed expert."""
        return self.moe_ffn_hidden_size or self.ffn_hidden_size

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding."""
        return math.ceil(self.vocab_size / self.make_vocab_size_divisible_by) * self.make_vocab_size_divisible_by
