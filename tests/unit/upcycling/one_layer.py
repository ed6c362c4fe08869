"""One feed-forward layer in float64: drawn, upcycled by a method, and computed by its definition."""

#   T tokens, H hidden, E experts, K experts of a token

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ext.checkpoint.streams import TensorSpec
from megatron_ext.config import ModelConfig
from megatron_ext.mcore.moe.selection import choose, normalize_gating_logits, scores_of, weights_of
from megatron_ext.merging.merge import Linear
from megatron_ext.merging.stream import Merged
from megatron_ext.testing.tiny import tiny_model
from megatron_ext.upcycling.feed_forward import FeedForward
from megatron_ext.upcycling.layers import layer_tasks
from megatron_ext.upcycling.methods.base import Draw, Method
from megatron_ext.upcycling.router import drawn_router
from megatron_ext.upcycling.sources import Sources

WIDTH, HIDDEN, TOKENS = 24, 64, 50
DENSE = tiny_model(ffn_hidden_size=WIDTH)
# float64 rounds to 1e-16; sums of up to 64 products leave 1e-14 of the scale.
EXACT = 1e-12
NAMES = {
    "fc1": "linear_fc1.weight",
    "fc2": "linear_fc2.weight",
    "fc1_bias": "linear_fc1.bias",
    "fc2_bias": "linear_fc2.bias",
}


def network(seed: int = 0, *, gated: bool = True, biased: bool = False) -> FeedForward:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows = 2 * WIDTH if gated else WIDTH
    biases = (draw(rows), draw(HIDDEN)) if biased else (None, None)
    return FeedForward(draw(rows, HIDDEN), draw(HIDDEN, WIDTH), *biases)


def output(ffn: FeedForward, x_TH: Tensor) -> Tensor:
    projected = F.linear(x_TH, ffn.fc1, ffn.fc1_bias)
    if ffn.halves == 2:
        gate, up = projected.chunk(2, dim=-1)
        hidden = F.silu(gate) * up
    else:
        hidden = F.gelu(projected)
    return F.linear(hidden, ffn.fc2, ffn.fc2_bias)


def model(method: Method, **changes: Any) -> ModelConfig:
    """The MoE model of `method` with `changes`."""
    fields: dict[str, Any] = {"num_moe_experts": 8, "moe_router_topk": 4, "moe_gating_normalization": None}
    return method.adjust(replace(DENSE, **(fields | changes)), DENSE)


def upcycled(method: Method, moe: ModelConfig, sources: Sequence[FeedForward], seed: int = 0) -> dict[str, Tensor]:
    """The tensors of the MoE layer that `method` makes of `sources`."""
    method.check(DENSE, moe)

    def router(draw: Draw) -> Tensor:
        return drawn_router("normal", 1.0, moe, method, draw)

    parts = [field.name for field in fields(FeedForward) if getattr(sources[0], field.name) is not None]
    stored = [StorageLocation({f"mlp.{NAMES[part]}": getattr(ffn, part) for part in parts}) for ffn in sources]
    average = Merged(Linear(weights=method.source_weights), stored, vocab_size=DENSE.vocab_size)
    stream, made = Sources(stored, average), {}
    for task in layer_tasks("mlp", parts, moe, method, router, sources=len(sources), seed=seed):
        results = task.make({role: stream.read(name) for role, name in task.reads.items()})
        made |= {task.writes[role]: tensor for role, tensor in results.items()}
    return made


class StorageLocation:
    """Tensors in memory as a source."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors
        self.specs = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()}

    def read(self, name: str) -> Tensor:
        return self._tensors[name]


def part(tensors: dict[str, Tensor], prefix: str) -> FeedForward:
    """The feed-forward network among `tensors` whose names begin with `prefix`."""
    return FeedForward(**{field: tensors.get(f"{prefix}.{name}") for field, name in NAMES.items()})  # type: ignore[arg-type]


def moe_output(tensors: dict[str, Tensor], moe: ModelConfig, x_TH: Tensor) -> Tensor:
    """The layer by its definition, in float64, routed by the functions that training routes by."""
    logits_TE = x_TH @ tensors["mlp.router.weight"].double().t()
    if moe.moe_gating_normalization is not None:
        logits_TE = normalize_gating_logits(logits_TE, moe.moe_gating_normalization)
    scores_TE = scores_of(logits_TE, moe)
    experts_TK = choose(logits_TE, scores_TE, moe, tensors.get("mlp.router.expert_bias"))
    weights_TK = weights_of(logits_TE, scores_TE, experts_TK, moe)
    total_TH = torch.zeros_like(x_TH)
    for expert in range(moe.num_moe_experts or 0):
        weight_T = (weights_TK * (experts_TK == expert)).sum(dim=1, keepdim=True)
        total_TH += weight_T * output(part(tensors, f"mlp.experts.{expert}"), x_TH)
    if moe.moe_shared_expert_intermediate_size is not None:
        shared_TH = output(part(tensors, "mlp.shared_experts"), x_TH)
        if moe.moe_shared_expert_gate:
            shared_TH = shared_TH * torch.sigmoid(x_TH @ tensors["mlp.shared_experts.gate_weight"].double().t())
        total_TH += shared_TH
    return total_TH


def tokens() -> Tensor:
    return torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
