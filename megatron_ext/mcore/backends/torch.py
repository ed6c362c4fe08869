"""The torch backend: every layer in plain PyTorch, on CPU and CUDA, with sequence and expert parallelism."""

from megatron.core.models.backends import LocalSpecProvider

from megatron_ext.mcore.attention import ScaledDotProductAttention
from megatron_ext.mcore.moe.experts import GroupedExperts
from megatron_ext.mcore.norm import LayerNorm, RMSNorm


class TorchSpecProvider(LocalSpecProvider):
    """megatron-core's local linear layers with our norm, attention and experts."""

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> type:
        """Return the norm class."""
        return RMSNorm if rms_norm else LayerNorm

    def core_attention(self) -> type:
        """Return the attention class."""
        return ScaledDotProductAttention

    def grouped_experts(self) -> type:
        """Return the class of one rank's routed experts."""
        return GroupedExperts
