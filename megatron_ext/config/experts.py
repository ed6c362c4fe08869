"""What a model with routed experts is beside a dense one: their number and widths, and how the router chooses."""

from typing import Annotated, Literal

from pydantic import Field

from megatron_ext.config.base import config
from megatron_ext.config.effect import shapes_function, shapes_weights
from megatron_ext.config.routing import GatingNormalization, RouterNoise


@config
class ExpertFields:
    """Experts and their router."""

    num_moe_experts: int | None = shapes_weights(default=None, ge=2)
    """Routed experts of a MoE layer. Unset: every layer is dense."""
    moe_ffn_hidden_size: int | None = shapes_weights(default=None, ge=1)
    """Intermediate width of one routed expert. Default: ffn_hidden_size."""
    moe_router_topk: int = shapes_function(default=2, ge=1)
    """Experts each token is sent to."""
    moe_router_score_function: Literal["softmax", "sigmoid"] = shapes_function(default="softmax")
    """How logits become scores. sigmoid is DeepSeek-V3's."""
    moe_router_pre_softmax: bool = shapes_function(default=False)
    """False: softmax over the selected experts, weights sum to 1 (Mixtral). True: softmax over all (Qwen2-MoE)."""
    moe_router_norm_topk_prob: bool | None = shapes_function(default=None)
    """Divide the selected scores by their sum. Default: with sigmoid. After a softmax over all experts: Qwen3-MoE."""
    moe_router_topk_scaling_factor: float | None = shapes_function(default=None, gt=0)
    """Factor on the selected experts' weights (DeepSeek's routed_scaling_factor)."""
    moe_router_num_groups: int | None = shapes_function(default=None, ge=2)
    """Group-limited routing: experts form this many groups, and tokens go to experts of the best groups only."""
    moe_router_group_topk: int | None = shapes_function(default=None, ge=1)
    """Groups each token may be sent to."""
    moe_router_group_score: Literal["top2_sum", "max"] = shapes_function(default="top2_sum")
    """A group's score: the sum of its two best experts (DeepSeek-V3) or its best (DeepSeek-V2)."""
    moe_router_linear_bias: bool = shapes_weights(default=False)
    """A learned bias in the router's logits (gpt-oss): unlike an expert bias, it weighs the chosen experts too."""
    moe_router_enable_expert_bias: bool = shapes_weights(default=False)
    """Balance without auxiliary loss (DeepSeek-V3, arXiv 2412.19437, section 2.1.2): a bias that only selects."""
    moe_router_noise: RouterNoise | None = shapes_weights(default=None)
    """Noisy gating, in training only."""
    moe_gating_normalization: GatingNormalization | None = shapes_function(default=None)
    """Normalize each token's router logits before the score function. `{}` takes Skywork's and Tanuki's values."""
    moe_shared_expert_intermediate_size: int | None = shapes_weights(default=None, ge=1)
    """Total intermediate width of the shared experts that every token passes through."""
    moe_shared_expert_gate: bool = shapes_weights(default=False)
    """Multiply the shared experts' output by the sigmoid of a learned gate (Qwen2-MoE)."""
    moe_first_k_dense: int = shapes_weights(default=0, ge=0)
    """The first k layers stay dense (DeepSeek's first_k_dense_replace)."""
    moe_layer_freq: Annotated[int, Field(ge=1)] | list[Literal[0, 1]] = shapes_weights(default=1)
    """n: every n-th layer is MoE, starting with layer 0. A list with one entry a layer: 1 is MoE, 0 is dense."""
