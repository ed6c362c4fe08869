"""How the model and the batch are split over processes, in Megatron's field names."""

from dataclasses import replace
from typing import Literal

from pydantic import Field

from megatron_ext.config.base import config

FlexBackend = Literal["deepep", "hybridep"]


@config
class ParallelConfig:
    """Degrees of parallelism. Data parallelism takes the processes that remain; expert parallelism lies inside it."""

    tensor_model_parallel_size: int = Field(default=1, ge=1)
    """TP: processes that share each layer's matrices."""
    sequence_parallel: bool = False
    """SP: split norms and residual stream along the sequence within a TP group. MoE training with TP needs it."""
    pipeline_model_parallel_size: int = Field(default=1, ge=1)
    """PP: stages of consecutive layers."""
    virtual_pipeline_model_parallel_size: int | None = Field(default=None, ge=2)
    """VPP: model chunks a stage (interleaved schedule)."""
    account_for_embedding_in_pipeline_split: bool = False
    """The embedding counts as a layer: the first chunk of the first stage has one layer less than the others."""
    account_for_loss_in_pipeline_split: bool = False
    """The loss, with the output layer, counts as a layer: the last chunk of the last stage has one layer less."""
    expert_model_parallel_size: int = Field(default=1, ge=1)
    """EP: processes that share the routed experts."""
    expert_tensor_parallel_size: int | None = Field(default=None, ge=1)
    """ETP: processes that share one routed expert's matrices. Default: the tensor-parallel size."""
    context_parallel_size: int = Field(default=1, ge=1)
    """CP: processes that share each sequence; each holds two slices of it, one early and one late."""
    moe_token_dispatcher_type: Literal["alltoall", "allgather", "flex"] = "alltoall"
    """How tokens travel to their experts. flex: by a library's kernels, which send a token once to each rank or node;
    they run on CUDA alone, and on no GPU of ours have they run yet."""
    moe_flex_dispatcher_backend: FlexBackend | None = None
    """With flex, the library: DeepEP, or its branch HybridEP. Default: deepep."""
    moe_shared_expert_overlap: bool = False
    """Compute shared experts while tokens travel to the routed ones, in a stream of their own."""
    use_distributed_optimizer: bool = True
    """Split optimizer state and fp32 master weights over data-parallel ranks (ZeRO-1)."""
    overlap_grad_reduce: bool | None = None
    """Reduce gradients while the backward pass still runs. Default: on CUDA, where there is data parallelism."""
    overlap_param_gather: bool | None = None
    """Gather updated parameters while the next forward pass already runs. Needs the two options above. Default: where
    gradients are reduced so by default, with use_distributed_optimizer."""

    @property
    def flex_backend(self) -> FlexBackend | None:
        """The library that sends tokens, with the default applied; None where no library does."""
        return (self.moe_flex_dispatcher_backend or "deepep") if self.moe_token_dispatcher_type == "flex" else None

    def settled(self, *, on_cuda: bool, copies: int) -> "ParallelConfig":
        """The same with its defaults of overlap applied.

        On a CPU nothing is gained: the processes that reduce are those that compute.

        Args:
            copies: ranks that hold the same dense weights, data-parallel x context-parallel ones.
        """
        by_default = on_cuda and copies > 1
        reduce, gather = self.overlap_grad_reduce, self.overlap_param_gather
        if gather is None:
            gather = by_default and reduce is not False and self.use_distributed_optimizer
        if reduce is None:
            reduce = by_default or gather
        return replace(self, overlap_grad_reduce=reduce, overlap_param_gather=gather)

    @property
    def counted_as_layers(self) -> int:
        """How many layers the embedding and the loss count for where layers are spread over stages."""
        return self.account_for_embedding_in_pipeline_split + self.account_for_loss_in_pipeline_split

    @property
    def etp(self) -> int:
        """Expert tensor-parallel size with the default applied."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size
