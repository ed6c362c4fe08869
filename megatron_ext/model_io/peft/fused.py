"""Queries, keys and values in one linear layer (GPT-2, GPT-NeoX): their adapters as one of that layer, and back."""

#   R rank, I inputs, O outputs; the layer's R is that of all three together

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_ext.architectures.tables.rules import BlockQkv, Qkv, Rule
from megatron_ext.config import ModelConfig

QKV = ("q", "k", "v")


def join(
    halves: Mapping[str, tuple[Tensor, Tensor, float]], rule: Rule, model: ModelConfig
) -> tuple[Tensor, Tensor, float]:
    """A [R, I], B [O, R] and scale of the layer: A one above the other, and in B a block for each.

    Args:
        halves: A, B and scale of each projection that has an adapter.
        rule: what the layer's weight is made of Megatron's by.
    """
    scale = next(iter(halves.values()))[2]
    ranks = [len(a) for a, _, _ in halves.values()]
    blocks = {}
    for name in QKV:
        rows = model.head_dim * (model.num_attention_heads if name == "q" else model.query_groups)
        parts = [torch.zeros(rows, rank) for rank in ranks]
        if name in halves:
            _, b, own = halves[name]
            parts[list(halves).index(name)] = b.float() * (own / scale)
        blocks[name] = torch.cat(parts, dim=1)
    b_OR = rule.to_hf(Qkv("").to_megatron(blocks, model), model)["tensor"]
    a_RI = torch.cat([a.float() for a, _, _ in halves.values()])
    return a_RI, (b_OR.t() if isinstance(rule, BlockQkv) else b_OR).contiguous(), scale


def split(a_RI: Tensor, b_OR: Tensor, rule: Rule, model: ModelConfig) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of each projection: of a third of the rank where each has a block of its own, else of the whole rank."""
    stored = b_OR.t() if isinstance(rule, BlockQkv) else b_OR
    parts = Qkv("").to_hf(rule.to_megatron({"tensor": stored}, model), model)
    width, rest = divmod(len(a_RI), len(QKV))
    columns = {name: slice(number * width, (number + 1) * width) for number, name in enumerate(QKV)}
    elsewhere = (parts[name][:, one].any() for name in QKV for other, one in columns.items() if other != name)
    if rest or any(map(bool, elsewhere)):
        return {name: (a_RI, part.contiguous()) for name, part in parts.items()}
    return {name: (a_RI[columns[name]], part[:, columns[name]].contiguous()) for name, part in parts.items()}
