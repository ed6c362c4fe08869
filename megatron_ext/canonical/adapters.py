"""The tensors of low-rank adapters: one pair for each projection of a linear layer, of each routed expert."""

#   y = W x + scale * B (A x);  A is [rank, inputs], B [outputs, rank]

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_ext.canonical.catalogue import ZEROS, CanonicalTensor, Normal, Uniform, model_tensors
from megatron_ext.config import LoraConfig, ModelConfig
from megatron_ext.config.adapters import EMBEDDING_MODULE, EXPERTS_PART, Projection, adapted_projections

LORA = ".lora."
"""What the names of adapter tensors have in them, and those of no others."""


@dataclass(frozen=True)
class AdapterPair:
    """One adapter, whole."""

    weight: str
    """Canonical name of the weight that it adds to."""
    projection: str
    """Which of the projections in that weight."""
    rank: int
    scale: float
    inputs: int
    outputs: int
    tp_dimension: int | None
    """The dimension of the weight that tensor parallelism splits: 0 splits B with it, 1 splits A."""
    layer: int | None
    is_expert: bool

    @property
    def a(self) -> str:
        """Canonical name of the half that the input goes through first."""
        return f"{self._prefix}.A"

    @property
    def b(self) -> str:
        """Canonical name of the half that makes the output."""
        return f"{self._prefix}.B"

    @property
    def _prefix(self) -> str:
        return f"{self.weight.removesuffix('.weight')}{LORA}{self.projection}"

    @property
    def is_embedding(self) -> bool:
        """Whether the weight is a table that tokens look up: its inputs are the vocabulary."""
        return self.weight == f"{EMBEDDING_MODULE}.weight"

    def tensors(self) -> Iterator[CanonicalTensor]:
        """Both halves. Their product is zero at first: B is, and of a table A, as PEFT begins."""
        drawn = Uniform(1 / math.sqrt(self.inputs))  # kaiming_uniform with a = sqrt(5)
        first = (ZEROS, Normal(0.0, 1.0)) if self.is_embedding else (drawn, ZEROS)
        split_a, split_b = (1 if self.tp_dimension == 1 else None), (0 if self.tp_dimension == 0 else None)
        where = (self.layer, self.is_expert)
        yield CanonicalTensor(self.a, (self.rank, self.inputs), first[0], split_a, *where)
        yield CanonicalTensor(self.b, (self.outputs, self.rank), first[1], split_b, *where)


def adapter_pairs(model: ModelConfig, adapters: LoraConfig) -> list[AdapterPair]:
    """Every adapter of `model`, in the order of the computation."""
    tensors = model_tensors(model)
    pairs = []
    for projection, target in adapted_projections(model, adapters).items():
        for name in _weights(projection, model):
            weight = tensors[name]
            rows, columns = weight.shape
            outputs, tp_dimension = projection_rows(model, projection.part, projection.name, rows), weight.tp_dimension
            if projection.module == EMBEDDING_MODULE:
                outputs, columns, tp_dimension = columns, rows, 1
            pairs.append(
                AdapterPair(
                    name,
                    projection.name,
                    target.rank,
                    adapters.scale(target),
                    columns,
                    outputs,
                    tp_dimension,
                    projection.layer,
                    projection.is_expert,
                )
            )
    return pairs


def adapter_tensors(model: ModelConfig, adapters: LoraConfig) -> dict[str, CanonicalTensor]:
    """Every tensor of the adapters by canonical name."""
    return {tensor.name: tensor for pair in adapter_pairs(model, adapters) for tensor in pair.tensors()}


def projection_rows(model: ModelConfig, part: str, name: str, rows: int) -> int:
    """The outputs of the projection `name` of the module `part`, whose weight has so many `rows`."""
    if part.endswith("linear_qkv"):
        return model.head_dim * (model.num_attention_heads if name == "q" else model.query_groups)
    if part.endswith("linear_fc1") and model.gated_linear_unit:
        return rows // 2
    return rows


def _weights(projection: Projection, model: ModelConfig) -> list[str]:
    """Canonical names of the weights that hold the projection: one, or one an expert."""
    if not projection.is_expert:
        return [f"{projection.module}.weight"]
    linear = projection.part.removeprefix(f"{EXPERTS_PART}.")
    block = f"decoder.layers.{projection.layer}.{EXPERTS_PART}"
    return [f"{block}.{expert}.{linear}.weight" for expert in range(model.num_moe_experts or 0)]
