"""megatron-core's self-attention, whose queries and keys are rotated by our own kernel where the run takes ours."""

#   S sequence of this rank, B micro-batch, N heads of this TP rank, D head width, R rotated width

from typing import Any

from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import _yarn_get_concentration_factor_from_config
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from megatron_ext.mcore.rotary import cosines_and_sines


class RotatedSelfAttention(SelfAttention):
    """Rotates in one pass where projections are split into queries and keys, and leaves megatron-core none to do.

    Its own rotation is the torch steps beside the kernel (mcore/kernels/rotary.py), taken without `triton_kernels`.
    """

    _rotation: tuple[Tensor, Tensor] | None = None
    """Cosines and sines of the forward pass that is under way, [S, R / 2]."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Any, *rest: Any, rotary_pos_emb: Tensor | None = None, **more: Any
    ) -> tuple[Tensor, Tensor | None]:
        """See SelfAttention; `rotary_pos_emb` is angles [S, 1, 1, R]."""
        if self.config.triton_kernels and rotary_pos_emb is not None and not self._turns_nothing():
            factor = _yarn_get_concentration_factor_from_config(self.config)
            neighbours = self.config.rotary_interleaved
            self._rotation = cosines_and_sines(rotary_pos_emb, factor, neighbours=neighbours)
            rotary_pos_emb = None
        try:
            output: tuple[Tensor, Tensor | None] = super().forward(
                hidden_states, attention_mask, *rest, rotary_pos_emb=rotary_pos_emb, **more
            )
        finally:
            self._rotation = None
        return output

    def get_query_key_value_tensors(self, *arguments: Any, **options: Any) -> Any:
        """megatron-core's hook: queries, keys [S, B, N, D], and what else there is of the projection."""
        found = super().get_query_key_value_tensors(*arguments, **options)
        if self._rotation is None:
            return found
        from megatron_ext.mcore.kernels.rotary import HALVES, NEIGHBOURS, rotate

        query, key, *others = found
        pairs = NEIGHBOURS if self.config.rotary_interleaved else HALVES
        turned = (rotate(x, *self._rotation, pairs) for x in (query, key))
        return *turned, *others

    def _turns_nothing(self) -> bool:
        """Whether this is a layer without rotation, which an override of megatron-core's `no_rope_freq` may make it."""
        without = self.config.no_rope_freq
        return bool(without and without[self.layer_number - 1])
