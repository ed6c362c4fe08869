"""Dense feed-forward networks and shared experts: megatron-core's, with the gated activation as one step."""

from typing import Any

from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from torch import Tensor

from megatron_ext.mcore.activation import gate_of, gated_activation


class CompleteMLP(MLP):
    """megatron-core's MLP that adds its output bias itself.

    Handed on as a second output, the bias is a parameter that megatron-core's recompute of this module takes for its
    own result: the backward pass then never ends (core_guard.py).
    """

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Return the output, shaped as `hidden_states`, and no bias left to add."""
        return _whole(*super().forward(hidden_states, *args, **kwargs)), None


class FeedForward(CompleteMLP):
    """The torch backend's; gated ones keep only the projected input for the backward pass."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Return the output, shaped as `hidden_states`, and no bias left to add."""
        if not self.config.gated_linear_unit:
            return super().forward(hidden_states, *args, **kwargs)
        projected = _whole(*self.linear_fc1(hidden_states))
        activated = gated_activation(projected, gate_of(self.config), triton=self.config.triton_kernels)
        return _whole(*self.linear_fc2(activated)), None


def _whole(output: Tensor, bias: Tensor | None) -> Tensor:
    """What a linear layer of megatron-core gives out as two."""
    return output if bias is None else output + bias


class SharedExperts(SharedExpertMLP, FeedForward):
    """megatron-core's shared experts, which gate what the feed-forward network returns, around ours."""
