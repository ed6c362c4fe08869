"""Routers made from what the dense model's feed-forward layers see on a text."""

#   T tokens, H hidden

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_ext.errors import DataError
from megatron_ext.model_io.compare import require_memory
from megatron_ext.model_io.network import megatron_network
from megatron_ext.model_io.text import comparison_batches
from megatron_ext.upcycling.content import dense_stream
from megatron_ext.upcycling.layers import RouterOf
from megatron_ext.upcycling.methods.base import Draw
from megatron_ext.upcycling.plan import UpcyclePlan
from megatron_ext.upcycling.router import repeated, router_from_activations

_TOKENS_A_ROW, _FEWEST = 256, 32
"""Tokens of text for each router row, and how few will do where the text is short."""
_ROWS, _LENGTH = 4, 128


@torch.no_grad()
def clustered_routers(plan: UpcyclePlan) -> RouterOf:
    """Routers whose rows are the directions of clusters of tokens, one layer at a time as the dense model runs.

    Loads the dense model (of several, their average) in fp32, in a process group of its own.

    Raises:
        DataError: too little text.
        ConversionError: too little memory.
    """
    assert plan.moe.num_moe_experts is not None
    rows = plan.moe.num_moe_experts // plan.method.group_size(plan.moe)
    source, options = plan.checkpoints[0].directory, plan.options
    require_memory(plan.dense, source)
    count = math.ceil(rows * _TOKENS_A_ROW / (_ROWS * _LENGTH))
    batches = comparison_batches(source, options.text, options.tokenizer, batches=count, rows=_ROWS, length=_LENGTH)
    tokens = torch.cat(batches)
    if tokens.numel() < rows * _FEWEST:
        raise DataError(
            f"router_init = activations: {rows} clusters need {rows * _FEWEST} tokens of text, and --text has "
            f"{tokens.numel()} in whole rows of {_LENGTH}"
        )
    found: dict[int, Tensor] = {}

    def cluster(layer: int, module: Any, inputs: tuple[Tensor, ...]) -> None:
        draw = Draw(plan.options.seed, f"decoder.layers.{layer}.mlp")
        found[layer] = router_from_activations(inputs[0].flatten(0, 1), rows, draw.generator("router.weight"))

    with megatron_network(plan.dense, dense_stream(plan)) as network:
        for number, layer in enumerate(network.decoder.layers):
            if plan.moe.moe_layer_pattern[number]:
                layer.mlp.register_forward_pre_hook(partial(cluster, number))
        network(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)

    def router_of(layer: int, draw: Draw) -> Tensor:
        return repeated(found[layer], plan.method, plan.moe)

    return router_of
