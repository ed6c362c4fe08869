"""Parameter counts of a model: in total, and those that work on each token."""

from dataclasses import dataclass

from megatron_ext.canonical.catalogue import EMBEDDING, OUTPUT, model_tensors
from megatron_ext.config import ModelConfig


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters without vocabulary padding."""

    total: int
    active: int
    """Parameters that take part in the computation of one token: of the routed experts only the selected ones."""


def count_parameters(model: ModelConfig) -> ParameterCounts:
    """Count the parameters of `model`."""
    tensors = model_tensors(model)
    padding = (model.padded_vocab_size - model.vocab_size) * model.hidden_size
    tables = sum(name in tensors for name in (EMBEDDING, OUTPUT))
    total = sum(tensor.size for tensor in tensors.values()) - tables * padding
    routed = sum(tensor.size for tensor in tensors.values() if tensor.is_expert)
    idle_share = 1 - model.moe_router_topk / model.num_moe_experts if model.num_moe_experts else 0
    return ParameterCounts(total, total - round(routed * idle_share))
