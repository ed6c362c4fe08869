"""The sizes of attention's matrices on one tensor-parallel rank, which FP8 kernels take in whole multiples only."""

from typing import Any


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
