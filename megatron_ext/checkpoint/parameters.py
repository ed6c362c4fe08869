"""Parameter counts of a model: in total, and those that work on each token."""

import math
from dataclasses import dataclass

from megatron_ext.checkpoint.shapes import model_shapes
from megatron_ext.config import ModelConfig


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters without vocabulary padding."""

    total: int
    active: int
    """Parameters that take part in the computation of one token: of the routed experts only the selected ones."""


def count_parameters(model: ModelConfig) -> ParameterCounts:
    """Count the parameters of `model`."""
    shapes = model_shapes(model)
    padding = (model.padded_vocab_size - model.vocab_size) * model.hidden_size
    tables = sum(name in shapes for name in ("embedding.word_embeddings.weight", "output_layer.weight"))
    total = sum(math.prod(shape) for shape in shapes.values()) - tables * padding
    routed = sum(math.prod(shape) for name, shape in shapes.items() if ".mlp.experts." in name)
    idle_share = 1 - model.moe_router_topk / model.num_moe_experts if model.num_moe_experts else 0
    return ParameterCounts(total, total - round(routed * idle_share))
