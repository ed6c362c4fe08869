"""Routed experts with adapters, one pair an expert and projection, as grouped matrix products."""

#   T tokens sorted by expert; E experts of this rank; F outputs of a projection

from typing import Any

import torch
from torch import Tensor

from megatron_ext.mcore.adapters.low_rank import Halves, ModuleAdapters
from megatron_ext.mcore.moe.experts import GroupedExperts
from megatron_ext.mcore.moe.grouped_linear import grouped_linear


class ExpertAdapters(GroupedExperts):
    """Comes before a class of grouped experts in the order of bases; `adapters` is a class attribute."""

    adapters: ModuleAdapters
    enabled = True
    """False: the base alone computes."""

    def __init__(self, num_local_experts: int, config: Any, pg_collection: Any, **unused: Any) -> None:
        super().__init__(num_local_experts, config, pg_collection, **unused)
        assert self.etp_group.size() == 1, "adapters of routed experts are not split"
        sizes = {"linear_fc1": (config.hidden_size, self.width), "linear_fc2": (self.width, config.hidden_size)}
        self.lora = torch.nn.ModuleDict()
        for linear, (inputs, outputs) in sizes.items():
            group = torch.nn.ModuleDict()
            for low_rank in self.adapters.of(linear):
                halves = Halves(low_rank, inputs, outputs, config.params_dtype, (num_local_experts,))
                for half in (halves.A, halves.B):
                    # As the weights: reduced over the expert data-parallel group in every layout, and no rank's copy.
                    self.mark_expert(half, split_dim=1)
                group[low_rank.projection] = halves
            self.lora[linear] = group

    def _halves(self, linear: str) -> dict[str, Halves]:
        group = self.lora[linear]
        assert isinstance(group, torch.nn.ModuleDict)
        return {name: halves for name, halves in group.items() if isinstance(halves, Halves)}

    def fc1(self, tokens_TH: Tensor, ends_E: Tensor) -> Tensor:
        """What the base computes, with the adapters' output added."""
        output, adapted = super().fc1(tokens_TH, ends_E), self._adapted("linear_fc1", tokens_TH, ends_E)
        if not adapted:
            return output
        missing = tokens_TH.new_zeros(*tokens_TH.shape[:-1], self.width)
        order = ("gate", "up") if self.config.gated_linear_unit else ("up",)
        return output + torch.cat([adapted.get(name, missing) for name in order], dim=-1)

    def fc2(self, hidden_TF: Tensor, ends_E: Tensor) -> Tensor:
        """What the base computes, with the adapters' output added."""
        output, adapted = super().fc2(hidden_TF, ends_E), self._adapted("linear_fc2", hidden_TF, ends_E)
        return output + adapted["down"] if adapted else output

    def _adapted(self, linear: str, x_TI: Tensor, ends_E: Tensor) -> dict[str, Tensor]:
        """The output of each adapter of a projection, [T, F]."""
        if not self.enabled:
            return {}
        made = {}
        for name, halves in self._halves(linear).items():
            A, B = halves()
            narrow_TR = grouped_linear(halves.dropped(x_TI), A, ends_E)
            made[name] = grouped_linear(narrow_TR * halves.low_rank.scale, B, ends_E)
        return made

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Describe the weights, and each half as one chunk an expert of a stacked global tensor."""
        described: dict[str, Any] = dict(super().sharded_state_dict(prefix, sharded_offsets, metadata))
        for linear in ("linear_fc1", "linear_fc2"):
            for name, halves in self._halves(linear).items():
                for half, parameter in (("A", halves.A), ("B", halves.B)):
                    key = f"{prefix}experts.{linear}.lora.{name}.{half}"
                    described[f"{prefix}lora.{linear}.{name}.{half}"] = self.sharded(key, parameter, sharded_offsets, 0)
        return described
