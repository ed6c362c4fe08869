"""The routed experts of one rank as two grouped matrix multiplications."""

#   T tokens sent to this rank, sorted by expert; E experts of this rank; H hidden; F width of one expert's shard

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ext.mcore.activation import gated_activation
from megatron_ext.mcore.moe.grouped_linear import grouped_linear


class GroupedExperts(MegatronModule):
    """SwiGLU experts by grouped matrix products: one call a projection, whatever the number of experts.

    Checkpoint keys and shapes are those of megatron-core's SequentialMLP and TEGroupedMLP, so the three load each
    other's checkpoints: `experts.linear_fc1.weight` [experts, 2F, H] (gate above up) and `experts.linear_fc2.weight`
    [experts, H, F].
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        **unused: Any,
    ) -> None:
        super().__init__(config=config)
        assert (config.gated_linear_unit, config.add_bias_linear) == (True, False), "experts are SwiGLU without biases"
        self.num_local_experts = num_local_experts
        self.ep_group, self.etp_group, self.edp_group = pg_collection.ep, pg_collection.expt_tp, pg_collection.expt_dp
        self.width = config.moe_ffn_hidden_size // self.etp_group.size()
        where = {"dtype": config.params_dtype, "device": torch.get_default_device()}
        self.weight1 = torch.nn.Parameter(torch.empty(num_local_experts, 2 * self.width, config.hidden_size, **where))
        self.weight2 = torch.nn.Parameter(torch.empty(num_local_experts, config.hidden_size, self.width, **where))
        for weight, split_dim in ((self.weight1, 1), (self.weight2, 2)):
            # Always an expert parameter, also with one expert-parallel rank: its gradient is reduced over the expert
            # data-parallel group and its optimizer is the expert one, in every layout. (megatron-core's own linear
            # layers mark experts only when EP > 1, which is wrong when ETP differs from TP.)
            weight.allreduce = False  # type: ignore[attr-defined]
            weight.tensor_model_parallel = True  # type: ignore[attr-defined]
            weight.partition_dim, weight.partition_stride = split_dim, 1  # type: ignore[attr-defined]

    def forward(self, tokens_TH: Tensor, tokens_per_expert_E: Tensor, weights_T: Tensor) -> tuple[Tensor, None]:
        """Return each token's expert output times its routing weight [T, H], and no bias."""
        if tokens_TH.shape[0] == 0:
            return self._no_tokens(tokens_TH, weights_T), None
        ends_E = tokens_per_expert_E.to(device=tokens_TH.device).cumsum(0).to(torch.int32)
        projected = grouped_linear(tokens_TH, self.weight1, ends_E)
        hidden_TF = gated_activation(projected, self.config.activation_func, weights_T)
        return grouped_linear(hidden_TF, self.weight2, ends_E), None

    def _no_tokens(self, tokens_TH: Tensor, weights_T: Tensor) -> Tensor:
        """An empty output that still depends on both weights: gradient reduction waits for every parameter's hook."""
        touched = 0 * (self.weight1.sum() + self.weight2.sum() + weights_T.sum())
        return tokens_TH + touched.to(tokens_TH.dtype)

    def backward_dw(self) -> None:
        """Weight gradients are computed in the backward pass; nothing was deferred."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, ShardedTensorFactory]:
        """Describe both weights as one chunk an expert (two for fc1: gate and up) of the stacked global tensors."""
        dense_dims = len(sharded_offsets)
        etp_rank, etp_size = self.etp_group.rank(), self.etp_group.size()
        first_expert = self.ep_group.rank() * self.num_local_experts
        all_experts = self.ep_group.size() * self.num_local_experts

        def chunk(key: str, data: Tensor, replica_id: Any, expert: int, *split: tuple[int, int, int]) -> ShardedTensor:
            offsets = (*sharded_offsets, (dense_dims, first_expert + expert, all_experts), *split)
            return ShardedTensor.from_rank_offsets(
                key, data, *offsets, replica_id=replica_id, prepend_axis_num=dense_dims + 1
            )

        def split_fc1(key: str, weight: Tensor, replica_id: Any, flattened_range: Any) -> list[ShardedTensor]:
            rows = dense_dims + 1  # gate rows of all ETP ranks come first, then all up rows
            return [
                chunk(key, half, replica_id, expert, (rows, which * etp_size + etp_rank, 2 * etp_size))
                for expert in range(self.num_local_experts)
                for which, half in enumerate(weight[expert].chunk(2, dim=0))
            ]

        def split_fc2(key: str, weight: Tensor, replica_id: Any, flattened_range: Any) -> list[ShardedTensor]:
            columns = dense_dims + 2
            return [
                chunk(key, weight[expert], replica_id, expert, (columns, etp_rank, etp_size))
                for expert in range(self.num_local_experts)
            ]

        def join_fc1(halves: list[Tensor]) -> Tensor:
            return torch.stack([torch.cat(halves[2 * e : 2 * e + 2]) for e in range(self.num_local_experts)])

        replica = (0, 0, self.edp_group.rank())
        fc1 = ShardedTensorFactory(f"{prefix}experts.linear_fc1.weight", self.weight1, split_fc1, join_fc1, replica)
        fc2 = ShardedTensorFactory(f"{prefix}experts.linear_fc2.weight", self.weight2, split_fc2, torch.stack, replica)
        return {f"{prefix}weight1": fc1, f"{prefix}weight2": fc2}
