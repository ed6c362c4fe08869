"""Variants of attention and of rotary position embedding."""

from typing import Annotated, Literal

from pydantic import Field

from megatron_ext.config.base import config
from megatron_ext.config.effect import shapes_function, shapes_weights


@config
class MultiLatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): low-rank queries, keys and values."""

    kv_lora_rank: int = shapes_weights(ge=1)
    """Width of the latent vector that keys and values are made from."""
    q_lora_rank: int | None = shapes_weights(default=None, ge=1)
    """Width of the latent vector that queries are made from. Unset: queries are projected directly."""
    qk_head_dim: int = shapes_weights(ge=1)
    """Width of a head's query and key that carries no position."""
    qk_pos_emb_head_dim: int = shapes_weights(ge=2, multiple_of=2)
    """Width of a head's query and key that is rotated; the key's part is shared by all heads."""
    v_head_dim: int = shapes_weights(ge=1)
    """Width of a head's value."""
    latent_norm_epsilon: float | None = shapes_function(default=None, gt=0)
    """Epsilon of the latent vectors' norms. Default: layernorm_epsilon. DeepSeek's code has 1e-6 whatever that is."""


@config
class LinearRopeScaling:
    """Positions are divided by `factor` (position interpolation, arXiv 2306.15595)."""

    kind: Literal["linear"] = shapes_function()
    factor: float = shapes_function(gt=1)
    """How many times longer the context becomes."""


@config
class DynamicRopeScaling:
    """Dynamic NTK: theta grows with the sequence once it is longer than max_position_embeddings."""

    kind: Literal["dynamic"] = shapes_function()
    factor: float = shapes_function(gt=1)
    """How many times longer the context becomes."""


@config
class Llama3RopeScaling:
    """Llama 3.1: long wavelengths are divided by `factor`, short ones kept, those between blended."""

    kind: Literal["llama3"] = shapes_function()
    factor: float = shapes_function(gt=1)
    """How many times longer the context becomes."""
    low_freq_factor: float = shapes_function(default=1.0, gt=0)
    """Wavelengths above original length / this are scaled."""
    high_freq_factor: float = shapes_function(default=4.0, gt=0)
    """Wavelengths below original length / this are kept."""
    original_max_position_embeddings: int = shapes_function(ge=1)
    """Context length before scaling."""


@config
class YarnRopeScaling:
    """YaRN (arXiv 2309.00071): NTK by parts, and a factor on the attention logits."""

    kind: Literal["yarn"] = shapes_function()
    factor: float = shapes_function(gt=1)
    """How many times longer the context becomes."""
    original_max_position_embeddings: int = shapes_function(ge=1)
    """Context length before scaling."""
    beta_fast: float = shapes_function(default=32.0, gt=0)
    """Rotations over the original context above which a dimension is kept."""
    beta_slow: float = shapes_function(default=1.0, gt=0)
    """Rotations over the original context below which a dimension is interpolated."""
    truncate: bool = shapes_function(default=True)
    """Round the dimensions between which it interpolates outwards to whole ones; gpt-oss does not."""
    mscale: float = shapes_function(default=0.0, ge=0)
    """DeepSeek's factor of the logits' scale. 0: not given, as in the paper."""
    mscale_all_dim: float = shapes_function(default=0.0, ge=0)
    """DeepSeek's factor for the whole head, applied to the softmax scale. 0: not given."""


RopeScaling = Annotated[
    LinearRopeScaling | DynamicRopeScaling | Llama3RopeScaling | YarnRopeScaling, Field(discriminator="kind")
]
