"""The routed experts of one rank as two grouped matrix multiplications."""

#   T tokens sent to this rank, sorted by expert; E experts of this rank; H hidden; F width of one expert's shard
#   O width of a bias

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ext.mcore.activation import gate_of, gated_activation
from megatron_ext.mcore.linear import gradient_sum
from megatron_ext.mcore.moe.grouped_linear import grouped_linear
from megatron_ext.mcore.split_parameters import mark_as_split


class _BiasOfRows(torch.autograd.Function):
    """The bias of its expert for each row; the gradient is a product, which adds up in fp32 and in a fixed order.

    Autograd's own adds rows by atomic operations on CUDA, in bf16 with a rounding after each: a sum stands still once
    it is some 256 times what is added.
    """

    @staticmethod
    def forward(ctx: Any, bias_EO: Tensor, counts_E: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(counts_E)
        return bias_EO.repeat_interleave(counts_E, dim=0, output_size=rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (counts_E,) = ctx.saved_tensors
        (grad_TO,) = grads
        expert_E = torch.arange(len(counts_E), device=grad_TO.device)
        expert_T = expert_E.repeat_interleave(counts_E, output_size=len(grad_TO))
        return (expert_E.unsqueeze(1) == expert_T).to(grad_TO.dtype) @ grad_TO, None, None


def bias_of_rows(bias_EO: Tensor, counts_E: Tensor, rows: int) -> Tensor:
    """The bias of its expert for each of the rows, sorted by expert, [T, O]."""
    of_rows: Tensor = _BiasOfRows.apply(bias_EO, counts_E, rows)
    return of_rows


class GroupedExperts(MegatronModule):
    """Experts by grouped matrix products: one call a projection, whatever the number of experts.

    Each is a feed-forward network as the dense layers' (gated or not, with biases or not); its output, bias included,
    counts with its routing weight. Checkpoint keys and shapes are those of megatron-core's SequentialMLP and
    TEGroupedMLP, so the three load each other's checkpoints: `experts.linear_fc1.weight` [experts, 2F, H] (gate above
    up; [experts, F, H] if not gated), `experts.linear_fc2.weight` [experts, H, F], and the same with `bias`.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        self.num_local_experts = num_local_experts
        self.ep_group, self.etp_group, self.edp_group = pg_collection.ep, pg_collection.expt_tp, pg_collection.expt_dp
        self.width = config.moe_ffn_hidden_size // self.etp_group.size()
        self.projections = 2 if config.gated_linear_unit else 1
        rows, hidden = self.projections * self.width, config.hidden_size
        self.weight1 = self._parameter(num_local_experts, rows, hidden, split_dim=1)
        self.weight2 = self._parameter(num_local_experts, hidden, self.width, split_dim=2)
        self.bias1 = self.bias2 = None
        if config.add_bias_linear:
            # One-dimensional, as megatron-core exempts those from weight decay. The output bias is split over the ETP
            # ranks too, though each computes all outputs: so it is added once to their sum.
            self.bias1 = self._parameter(num_local_experts * rows, split_dim=0)
            self.bias2 = self._parameter(num_local_experts * hidden // self.etp_group.size(), split_dim=0)

    def _parameter(self, *shape: int, split_dim: int) -> torch.nn.Parameter:
        """An expert parameter whose gradient is reduced over the expert data-parallel group in every layout.

        megatron-core's own linear layers mark experts only when EP > 1, which is wrong when ETP differs from TP.
        """
        weight = torch.nn.Parameter(
            torch.empty(*shape, dtype=self.config.params_dtype, device=torch.get_default_device())
        )
        self.mark_expert(weight, split_dim)
        return weight

    @staticmethod
    def mark_expert(weight: Any, split_dim: int) -> None:
        """Tell megatron-core that `weight` is an expert's, and no other TP rank has a copy."""
        weight.allreduce = False
        mark_as_split(weight, split_dim)

    def forward(self, tokens_TH: Tensor, tokens_per_expert_E: Tensor, weights_T: Tensor) -> tuple[Tensor, None]:
        """Return each token's expert output times its routing weight [T, H], and no bias left to add.

        Where each expert has as many rows as the others, they may come as [E, C, H] with weights [E, C], and so return.
        """
        if tokens_TH.shape[0] == 0:
            return self._no_tokens(tokens_TH, weights_T), None
        counts_E = tokens_per_expert_E.to(device=tokens_TH.device)
        ends_E = counts_E.cumsum(0).to(torch.int32)
        projected = self.fc1(tokens_TH, ends_E)
        if self.bias1 is not None:
            projected = projected + self._of_each_token(self.bias1, counts_E, projected)
        output_TH = self.fc2(self._activated(projected, weights_T), ends_E)
        if self.bias2 is not None:
            bias = self._of_each_token(self.bias2, counts_E, output_TH) * weights_T.unsqueeze(-1)
            before = self.etp_group.rank() * bias.shape[-1]
            after = output_TH.shape[-1] - before - bias.shape[-1]
            output_TH = output_TH + F.pad(bias.to(output_TH.dtype), (before, after))
        return output_TH, None

    def fc1(self, tokens_TH: Tensor, ends_E: Tensor) -> Tensor:
        """Multiply each expert's tokens by its own first weight: [T, F], or [T, 2 F] if gated."""
        return self._product(tokens_TH, self.weight1, ends_E)

    def fc2(self, hidden_TF: Tensor, ends_E: Tensor) -> Tensor:
        """Multiply each expert's hidden units by its own second weight: [T, H]."""
        return self._product(hidden_TF, self.weight2, ends_E)

    def _product(self, rows: Tensor, weight: Tensor, ends_E: Tensor) -> Tensor:
        total = gradient_sum(self.config, weight)
        return grouped_linear(rows, weight, ends_E, total, triton=self.config.triton_kernels)

    def _activated(self, projected: Tensor, weights_T: Tensor) -> Tensor:
        """The hidden units times their token's routing weight [T, F]."""
        if self.config.gated_linear_unit:
            return gated_activation(projected, gate_of(self.config), weights_T, triton=self.config.triton_kernels)
        return (self.config.activation_func(projected) * weights_T.unsqueeze(-1)).to(projected.dtype)

    def _of_each_token(self, bias: Tensor, counts_E: Tensor, rows: Tensor) -> Tensor:
        """The part of `bias` [E * width] of the expert that each of `rows` goes to, [T, width], or [E, 1, width]."""
        bias_EO = bias.view(self.num_local_experts, -1)
        if rows.dim() == 3:
            return bias_EO.unsqueeze(1)
        if rows.device.type == "cpu":  # adds up in fp32 by itself, and compiles no kernel for each number of rows
            return bias_EO.repeat_interleave(counts_E, dim=0, output_size=len(rows))
        return bias_of_rows(bias_EO, counts_E, len(rows))

    def _no_tokens(self, tokens_TH: Tensor, weights_T: Tensor) -> Tensor:
        """An empty output that still depends on every parameter: gradient reduction waits for every one's hook."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        touched = 0 * sum((parameter.sum() for parameter in trained), start=weights_T.sum())
        return tokens_TH + touched.to(tokens_TH.dtype)

    def backward_dw(self) -> None:
        """Weight gradients are computed in the backward pass; nothing was deferred."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, ShardedTensorFactory]:
        """Describe every parameter as one chunk an expert (of a gated fc1 two) of the stacked global tensors."""
        # Of a gated fc1 the gate rows of all ETP ranks come first, then all up rows.
        first, second = f"{prefix}experts.linear_fc1", f"{prefix}experts.linear_fc2"
        halves = self.projections
        described = {
            "weight1": self.sharded(f"{first}.weight", self.weight1, sharded_offsets, 0, halves),
            "weight2": self.sharded(f"{second}.weight", self.weight2, sharded_offsets, 1),
        }
        if self.bias1 is not None and self.bias2 is not None:
            described["bias1"] = self.sharded(f"{first}.bias", self.bias1, sharded_offsets, 0, halves)
            described["bias2"] = self.sharded(f"{second}.bias", self.bias2, sharded_offsets, 0)
        return {f"{prefix}{name}": factory for name, factory in described.items()}

    def sharded(
        self, key: str, parameter: Tensor, sharded_offsets: tuple[Any, ...], split_dim: int, halves: int = 1
    ) -> ShardedTensorFactory:
        """`parameter` as chunks of the global tensor `key`; ETP splits dimension `split_dim` of one expert's part.

        Args:
            halves: of so many matrices one after the other in that dimension, each is split by itself.
        """
        dense_dims, experts = len(sharded_offsets), self.num_local_experts
        etp_rank, etp_size = self.etp_group.rank(), self.etp_group.size()

        def build(key: str, stacked: Tensor, replica_id: Any, flattened_range: Any) -> list[ShardedTensor]:
            return [
                ShardedTensor.from_rank_offsets(
                    key,
                    half,
                    *sharded_offsets,
                    (dense_dims, self.ep_group.rank() * experts + expert, self.ep_group.size() * experts),
                    (dense_dims + 1 + split_dim, which * etp_size + etp_rank, halves * etp_size),
                    replica_id=replica_id,
                    prepend_axis_num=dense_dims + 1,
                )
                for expert, whole in enumerate(stacked.view(experts, -1, *stacked.shape[2:]))
                for which, half in enumerate(whole.chunk(halves, dim=0))
            ]

        def merge(parts: list[Tensor]) -> Tensor:
            return torch.cat(parts).view(parameter.shape)

        return ShardedTensorFactory(key, parameter, build, merge, (0, 0, self.edp_group.rank()))
