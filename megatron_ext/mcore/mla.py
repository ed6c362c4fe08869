"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) on megatron-core's, right under TP.

Weights have the layout of Hugging Face's DeepSeek-V2 and V3, so each is copied as it is: megatron-core, too, takes the
rotated dimensions of a head as interleaved pairs and sorts them into halves after the projection, queries and keys
alike. `linear_q_down_proj`, `linear_kv_down_proj`, `linear_q_up_proj`, `linear_kv_up_proj` and `linear_q_proj` are
`q_a_proj`, `kv_a_proj_with_mqa`, `q_b_proj`, `kv_b_proj` and `q_proj` there; the norms are `q_a_layernorm` and
`kv_a_layernorm`.
"""

#   S sequence of this rank, B micro-batch, H hidden, C width of the latent vector, R rotated width of the shared key

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.transformer_config import MLATransformerConfig
from torch import Tensor

from megatron_ext.config import ModelConfig
from megatron_ext.mcore.group_sums import sum_gradient_over_group
from megatron_ext.mcore.rotary import LatentRotaryEmbedding, cosines_and_sines


class DownProjection(MegatronModule):
    """The projection to a latent vector, whole on every TP rank.

    Megatron-core splits it over the TP group where Transformer Engine is missing, and then each rank keeps its part of
    the shared key's gradient to itself (core_guard.py). Under sequence parallelism each rank projects its own tokens.

    Args:
        shared: the last outputs that go to the heads as they are (the key's rotated part).
    """

    def __init__(self, config: MLATransformerConfig, outputs: int, shared: int, tp_group: Any) -> None:
        super().__init__(config=config)
        self.shared, self.tp_group = shared, tp_group
        where = {"dtype": config.params_dtype, "device": torch.get_default_device()}
        self.weight = torch.nn.Parameter(torch.empty(outputs, config.hidden_size, **where))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden_SBH: Tensor) -> tuple[Tensor, None]:
        """Return the latent vector and, after it, the shared outputs [S, B, C + R]; and no bias."""
        latent = self.project(hidden_SBH)
        if self.shared and self.tp_group.size() > 1 and not self.config.sequence_parallel:
            # The heads of every rank use these outputs; with sequence parallelism gathering them sums the gradient.
            latent_SBC, shared_SBR = latent.split((latent.shape[-1] - self.shared, self.shared), dim=-1)
            shared_SBR = sum_gradient_over_group(shared_SBR, self.tp_group)
            latent = torch.cat((latent_SBC, shared_SBR), dim=-1)
        return latent, None

    def project(self, hidden_SBH: Tensor) -> Tensor:
        """The product alone, [S, B, C + R]."""
        return F.linear(hidden_SBH, self.weight)

    def backward_dw(self) -> None:
        """Weight gradients are computed in the backward pass; nothing was deferred."""


class LatentAttention(MLASelfAttention):
    """megatron-core's latent attention, built here: with our down-projections and rotary embedding.

    Its own constructors want Transformer Engine (core_guard.py). The head width of `config` must be that of the
    values and its `softmax_scale` set: what is common to all attention, the core and the output projection, is then
    built as it should be by megatron-core.
    """

    def __init__(
        self, config: MLATransformerConfig, submodules: MLASelfAttentionSubmodules, *, model: ModelConfig, **kwargs: Any
    ) -> None:
        Attention.__init__(self, config=config, submodules=submodules, attention_type="self", **kwargs)
        self.q_head_dim = config.qk_head_dim + config.qk_pos_emb_head_dim
        self.recompute_up_proj = False
        self.cache_mla_latents = False
        self.rotary_pos_emb = LatentRotaryEmbedding(model, config, self.pg_collection.cp)
        self._build_queries(submodules, model.latent_norm_epsilon)
        self._build_keys_and_values(submodules, model.latent_norm_epsilon)

    def get_query_key_value_tensors(self, hidden_states: Tensor, *arguments: Any, **options: Any) -> Any:
        """megatron-core's hook: queries, keys, values [S, B, N, ...], and both latent vectors after their norms.

        Where the run takes our own kernels queries are turned in one pass, as they were projected; megatron-core's
        steps split, turn and join them. The other arguments are None in training.
        """
        if not self.config.triton_kernels:
            return super().get_query_key_value_tensors(hidden_states, *arguments, **options)
        from megatron_ext.mcore.kernels.rotary import LATENT, rotate

        config, heads = self.config, self.num_attention_heads_per_partition
        length = self.rotary_pos_emb.get_rotary_seq_len(None, None, hidden_states, config, None)
        angles, factor = self.rotary_pos_emb(length)
        turns = cosines_and_sines(angles, factor, neighbours=False)
        query_SBH, query_latent_SBC = self._projected_queries(hidden_states)
        latents, _ = self.linear_kv_down_proj(hidden_states)
        latent_SBC, shared_SBR = latents.split((config.kv_lora_rank, config.qk_pos_emb_head_dim), dim=-1)
        if config.sequence_parallel and self.tp_group.size() > 1:
            shared_SBR = gather_from_sequence_parallel_region(shared_SBR, group=self.tp_group)
        latent_SBC = self.kv_layernorm(latent_SBC)
        projected, _ = self.linear_kv_up_proj(latent_SBC)
        key, value = projected.unflatten(-1, (heads, -1)).split((config.qk_head_dim, config.v_head_dim), dim=-1)
        shared = rotate(shared_SBR.unsqueeze(-2), *turns, LATENT).expand(-1, -1, heads, -1)
        query = rotate(query_SBH.unflatten(-1, (heads, self.q_head_dim)), *turns, LATENT)
        return query, torch.cat((key, shared), dim=-1), value.contiguous(), query_latent_SBC, latent_SBC

    def _projected_queries(self, hidden_SBH: Tensor) -> tuple[Tensor, Tensor]:
        """The queries of this rank's heads, and what they were projected from."""
        if self.config.q_lora_rank is None:
            return self.linear_q_proj(hidden_SBH)[0], hidden_SBH
        latent_SBC = self.q_layernorm(self.linear_q_down_proj(hidden_SBH)[0])
        return self.linear_q_up_proj(latent_SBC)[0], latent_SBC

    def _build_queries(self, submodules: MLASelfAttentionSubmodules, epsilon: float) -> None:
        config = self.config
        queries = config.num_attention_heads * self.q_head_dim
        if config.q_lora_rank is None:
            self.linear_q_proj = self._column(submodules.linear_q_proj, config.hidden_size, queries, "q_proj")
            return
        self.linear_q_down_proj = submodules.linear_q_down_proj(config, config.q_lora_rank, 0, self.tp_group)
        self.q_layernorm = submodules.q_layernorm(hidden_size=config.q_lora_rank, config=config, eps=epsilon)
        self.linear_q_up_proj = self._column(submodules.linear_q_up_proj, config.q_lora_rank, queries, "q_up_proj")

    def _build_keys_and_values(self, submodules: MLASelfAttentionSubmodules, epsilon: float) -> None:
        config, shared = self.config, self.config.qk_pos_emb_head_dim
        latents = config.kv_lora_rank + shared
        self.linear_kv_down_proj = submodules.linear_kv_down_proj(config, latents, shared, self.tp_group)
        self.kv_layernorm = submodules.kv_layernorm(hidden_size=config.kv_lora_rank, config=config, eps=epsilon)
        outputs = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
        self.linear_kv_up_proj = self._column(submodules.linear_kv_up_proj, config.kv_lora_rank, outputs, "kv_up_proj")

    def _column(self, linear: Any, inputs: int, outputs: int, buffer: str) -> Any:
        return linear(
            inputs,
            outputs,
            config=self.config,
            init_method=self.config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name=buffer,
            tp_group=self.tp_group,
        )
