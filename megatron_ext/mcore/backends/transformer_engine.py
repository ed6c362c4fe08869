"""The Transformer Engine backend: megatron-core's TE layers, saved as the torch backend saves its own. CUDA only."""

from typing import Any

import torch
from megatron.core.extensions import transformer_engine as te
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe import experts as core_experts
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from megatron_ext.mcore.feed_forward import CompleteMLP
from megatron_ext.mcore.scaling_state import ScalingState
from megatron_ext.mcore.split_parameters import mark_as_split

# megatron-core 0.19 has a class of its own for the parts of TEGroupedMLP; 0.16 takes an MLP's.
_GroupedSubmodules = getattr(core_experts, "GroupedMLPSubmodules", None) or core_experts.MLPSubmodules


class _SavesScaling:
    """A linear layer whose delayed scaling is in checkpoints as plain tensors, one set a matrix.

    Transformer Engine pickles it into a byte tensor instead, which only itself can read, and megatron-core's cut of
    that for each expert refuses to unpickle (0.19) or takes the columns of other experts (core_guard.py). Every rank
    that holds a part of a matrix has the same state: maxima are reduced over them in each step.
    """

    config: TransformerConfig
    fp8_meta: dict[str, Any]

    def get_extra_state(self) -> ScalingState | None:
        """The layer's scales and amax history, alive; None unless it computes in FP8 with delayed scaling."""
        if not self.config.fp8 or self.config.fp8_recipe != "delayed":
            return None
        if "scaling_fwd" not in self.fp8_meta:
            # It has not computed yet: what its first pass would begin with, so that there is something to load into.
            with get_fp8_context(self.config):
                self.init_fp8_metadata(num_gemms=getattr(self, "num_gemms", 1))  # type: ignore[attr-defined]
        tensors = {}
        for direction in ("fwd", "bwd"):
            scaling = self.fp8_meta[f"scaling_{direction}"]
            tensors[f"scale_{direction}"] = scaling.scale
            tensors[f"amax_history_{direction}"] = scaling.amax_history
        return ScalingState(tensors)

    def set_extra_state(self, state: ScalingState | None) -> None:
        """Nothing to do: loading fills the tensors in place."""


class ColumnParallelLinear(_SavesScaling, te.TEColumnParallelLinear):
    """Linear layer whose output is split over the TP group."""


class LayerNormColumnParallelLinear(_SavesScaling, te.TELayerNormColumnParallelLinear):
    """A norm and the linear layer after it, as one kernel."""


class RowParallelLinear(_SavesScaling, te.TERowParallelLinear):
    """Linear layer whose input is split over the TP group."""


class _GroupedLinear(_SavesScaling):
    num_gemms: int
    _offsets: dict[str, int]

    def _split_extra_state(self, state: ScalingState | None) -> list[ScalingState | None]:
        """One state an expert, views of the whole; called by megatron-core, which unpickles and copies here."""
        if state is None:
            return [None] * self.num_gemms
        experts, by_expert = self.num_gemms, self._offsets["weight"] == 1

        def columns_of(tensor: torch.Tensor, expert: int) -> torch.Tensor:
            # The last dimension is (input, weight, output) of each expert, or in older versions of Transformer Engine
            # the inputs of all experts, their weights, their outputs.
            return tensor.tensor_split(experts, dim=-1)[expert] if by_expert else tensor[..., expert::experts]

        return [
            ScalingState({name: columns_of(tensor, expert) for name, tensor in state.tensors.items()})
            for expert in range(experts)
        ]


class ColumnParallelGroupedLinear(_GroupedLinear, te.TEColumnParallelGroupedLinear):
    """First projection of a rank's experts."""


class RowParallelGroupedLinear(_GroupedLinear, te.TERowParallelGroupedLinear):
    """Second projection of a rank's experts."""


class GroupedExperts(TEGroupedMLP):
    """megatron-core's TEGroupedMLP with parameters marked as the torch backend's experts are, in every layout."""

    def __init__(
        self, num_local_experts: int, config: TransformerConfig, pg_collection: ProcessGroupCollection, **unused: Any
    ) -> None:
        parts = _GroupedSubmodules(linear_fc1=ColumnParallelGroupedLinear, linear_fc2=RowParallelGroupedLinear)
        super().__init__(num_local_experts, config, parts, pg_collection=pg_collection)
        for linear, split_dim in ((self.linear_fc1, 0), (self.linear_fc2, 1)):
            for name, parameter in linear.named_parameters():
                # See moe/experts.py: expert parameters also with EP = 1. megatron-core 0.16 marks none as split, and
                # leaves them out of the gradient norm on all but one TP rank.
                parameter.allreduce = False
                parameter.tensor_model_parallel = name.startswith("weight") or split_dim == 0
                parameter.partition_dim, parameter.partition_stride = split_dim, 1


class CoreAttention(te.TEDotProductAttention):
    """Attention within sliding windows and with sinks, where the configuration has them."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if config.softmax_type == "learnable":
            mark_as_split(self.softmax_offset, dim=0)


class LatentCoreAttention(te.TEDotProductAttention):
    """Attention whose values have another width than queries and keys (mcore/mla.py)."""

    def __init__(self, config: MLATransformerConfig, *args: Any, **kwargs: Any) -> None:
        widths = {"k_channels": config.qk_head_dim + config.qk_pos_emb_head_dim, "v_channels": config.v_head_dim}
        super().__init__(config, *args, **widths, **kwargs)


class TransformerEngineLayers:
    """A `LayerProvider`: megatron-core's TE modules, with the classes above."""

    fuses_norms = True

    def norm(self, normalization: str) -> type:
        """Return the norm class; it reads the kind from the configuration."""
        return te.TENorm

    def column_parallel_linear(self) -> type:
        """Return the class of linear layers split by output."""
        return ColumnParallelLinear

    def row_parallel_linear(self) -> type:
        """Return the class of linear layers split by input."""
        return RowParallelLinear

    def linear_after_norm(self) -> type:
        """Return the class of a norm with the linear layer after it."""
        return LayerNormColumnParallelLinear

    def core_attention(self) -> type:
        """Return the attention class."""
        return CoreAttention

    def latent_core_attention(self) -> type:
        """Return the class of attention whose values have another width than queries and keys."""
        return LatentCoreAttention

    def feed_forward(self) -> type:
        """Return the class of a dense feed-forward network: megatron-core's, which has fused kernels on CUDA."""
        return CompleteMLP

    def shared_experts(self) -> type:
        """Return the class of shared experts without biases."""
        return SharedExpertMLP

    def grouped_experts(self) -> type:
        """Return the class of one rank's routed experts."""
        return GroupedExperts
