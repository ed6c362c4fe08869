"""The sizes of matrices on one tensor-parallel rank, which FP8 kernels take in whole multiples only."""

from typing import Any

from megatron_ext.config.rules.registry import EXPERTS, TP

SPLIT_WIDTHS = (
    ("model.ffn_hidden_size", TP, "model.has_dense_layers"),
    ("model.moe_shared_expert_intermediate_size", TP, EXPERTS),
    ("model.expert_ffn_hidden_size", "parallel.etp", EXPERTS),
)
"""Feed-forward widths: (key, the degree that splits it, what says that the model has such layers)."""


def attention_widths(latent: Any, heads: int, groups: int | None, head_dim: int, tp: int) -> list[int]:
    """What the linear layers of attention contract over or give out, besides hidden_size.

    Args:
        latent: the model's MultiLatentAttention, or None.
        head_dim: width of a head's query and key.
    """
    if latent is None:
        return [heads * head_dim // tp, (heads + 2 * (groups or heads)) * head_dim // tp]
    ranks = [rank for rank in (latent.q_lora_rank, latent.kv_lora_rank) if rank is not None]
    per_head = (head_dim, latent.qk_head_dim + latent.v_head_dim, latent.v_head_dim)
    return ranks + [heads * width // tp for width in per_head]
