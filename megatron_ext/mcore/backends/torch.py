"""The torch backend: every layer in plain PyTorch, on CPU and CUDA, with sequence and expert parallelism."""

from megatron_ext.mcore.attention import ScaledDotProductAttention
from megatron_ext.mcore.feed_forward import FeedForward, SharedExperts
from megatron_ext.mcore.fp8.experts import Fp8GroupedExperts
from megatron_ext.mcore.fp8.linear import Fp8ColumnParallelLinear, Fp8RowParallelLinear
from megatron_ext.mcore.linear import ColumnParallelLinear, RowParallelLinear
from megatron_ext.mcore.moe.experts import GroupedExperts
from megatron_ext.mcore.norm import LayerNorm, RMSNorm


class TorchLayers:
    """A `LayerProvider`: megatron-core's linear layers, all but their gradients, with our norms, attention, experts."""

    fuses_norms = False

    def norm(self, normalization: str) -> type:
        """Return the norm class."""
        return RMSNorm if normalization == "RMSNorm" else LayerNorm

    def column_parallel_linear(self) -> type:
        """Return the class of linear layers split by output features."""
        return ColumnParallelLinear

    def row_parallel_linear(self) -> type:
        """Return the class of linear layers split by input features."""
        return RowParallelLinear

    def linear_after_norm(self) -> type:
        """Return the class of the linear layer after a norm: no other than elsewhere."""
        return self.column_parallel_linear()

    def core_attention(self) -> type:
        """Return the attention class."""
        return ScaledDotProductAttention

    def latent_core_attention(self) -> type:
        """Return the class of attention whose values have another width than queries and keys."""
        return ScaledDotProductAttention

    def feed_forward(self) -> type:
        """Return the class of a dense feed-forward network."""
        return FeedForward

    def shared_experts(self) -> type:
        """Return the class of shared experts without biases."""
        return SharedExperts

    def grouped_experts(self) -> type:
        """Return the class of one rank's routed experts."""
        return GroupedExperts


class Fp8TorchLayers(TorchLayers):
    """The torch backend with the matrix products of linear layers and routed experts in fp8 (`config.torch_fp8`)."""

    def column_parallel_linear(self) -> type:
        """Return the class of linear layers split by output features."""
        return Fp8ColumnParallelLinear

    def row_parallel_linear(self) -> type:
        """Return the class of linear layers split by input features."""
        return Fp8RowParallelLinear

    def grouped_experts(self) -> type:
        """Return the class of one rank's routed experts."""
        return Fp8GroupedExperts
