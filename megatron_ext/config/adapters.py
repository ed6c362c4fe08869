"""Low-rank adapters beside frozen weights (LoRA, arXiv 2106.09685): which linear layers get them, and how large."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from pydantic import Field

from megatron_ext.config.base import config
from megatron_ext.config.model import ModelConfig

EMBEDDING_MODULE, OUTPUT_MODULE = "embedding.word_embeddings", "output_layer"
EXPERTS_PART = "mlp.experts"


@config
class LoraTarget:
    """Some linear layers, and the size of their adapters."""

    match: list[str] = Field(default_factory=lambda: ["layers.*"], min_length=1)
    """Projections by name, with * for anything: `q`, `k`, `v`, `o`, `gate`, `up`, `down` (of latent attention `q_a`,
    `q_b`, `kv_a`, `kv_b`), `self_attention.*`, `experts.*`, `shared_experts.*`, `layers.3.*`, `embedding.*`,
    `output_layer`. Default: every linear layer of every decoder layer, but for the router."""
    rank: int = Field(default=16, ge=1)
    """Rank of the product that is added to the weight. Of routed experts each has its own adapter of this rank."""
    alpha: float = Field(default=32.0, gt=0)
    """The product counts alpha / rank times."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the adapter's inputs that is left out at random in training."""


@config
class LoraConfig:
    """Low-rank adapters, trained in place of the weights of a base model, which checkpoint.initialize_from names.

    Checkpoints hold the adapters and their optimizer; tools/merge_lora.py adds them to the weights.
    """

    targets: list[LoraTarget] = Field(default_factory=lambda: [LoraTarget()], min_length=1)
    """What gets adapters; of several that match a projection the first counts."""
    use_rslora: bool = False
    """The product counts alpha / sqrt(rank) times (rsLoRA, arXiv 2312.03732)."""
    lr_ratio: float = Field(default=1.0, gt=0)
    """The output half learns with so many times the learning rate (LoRA+, arXiv 2402.12354: 16)."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay of the adapters, in place of optimizer.weight_decay."""

    def scale(self, target: LoraTarget) -> float:
        """How often the product of `target` counts."""
        return target.alpha / (math.sqrt(target.rank) if self.use_rslora else target.rank)


@dataclass(frozen=True)
class Projection:
    """One linear layer as Hugging Face has it; Megatron's may hold several."""

    layer: int | None
    """The decoder layer, counted from 0; None: outside."""
    part: str
    """The module it belongs to, named within the layer; of routed experts with the linear layer of one of them."""
    name: str
    """Which of the module's projections it is."""

    @property
    def module(self) -> str:
        """The module, named within the model."""
        return self.part if self.layer is None else f"decoder.layers.{self.layer}.{self.part}"

    @property
    def is_expert(self) -> bool:
        """Whether every routed expert of the layer has one."""
        return self.part.startswith(f"{EXPERTS_PART}.")

    def matches(self, pattern: str) -> bool:
        """Whether `pattern` means it: its name, its module's, or the end of either."""
        names = (f"{self.module}.{self.name}", self.module)
        return any(fnmatchcase(name, form) for name in names for form in (pattern, f"*.{pattern}"))


def projections(model: ModelConfig) -> Iterator[Projection]:
    """Every projection of `model` that can have an adapter, in the order of the computation."""
    yield Projection(None, EMBEDDING_MODULE, "embed")
    for layer, is_moe in enumerate(model.moe_layer_pattern):
        for part, names in _attention(model) + _feed_forward(model, is_moe=is_moe):
            for name in names:
                yield Projection(layer, part, name)
    yield Projection(None, OUTPUT_MODULE, "head")


_Parts = list[tuple[str, tuple[str, ...]]]


def _attention(model: ModelConfig) -> _Parts:
    latent = model.multi_latent_attention
    if latent is None:
        parts: _Parts = [("linear_qkv", ("q", "k", "v"))]
    else:
        queries: _Parts = [("linear_q_proj", ("q",))]
        if latent.q_lora_rank is not None:
            queries = [("linear_q_down_proj", ("q_a",)), ("linear_q_up_proj", ("q_b",))]
        parts = [*queries, ("linear_kv_down_proj", ("kv_a",)), ("linear_kv_up_proj", ("kv_b",))]
    return [(f"self_attention.{part}", names) for part, names in (*parts, ("linear_proj", ("o",)))]


def _feed_forward(model: ModelConfig, *, is_moe: bool) -> _Parts:
    first = ("gate", "up") if model.gated_linear_unit else ("up",)
    networks = ["mlp"]
    if is_moe:
        networks = [EXPERTS_PART] + (["mlp.shared_experts"] if model.moe_shared_expert_intermediate_size else [])
    return [part for n in networks for part in ((f"{n}.linear_fc1", first), (f"{n}.linear_fc2", ("down",)))]


def adapted_projections(model: ModelConfig, adapters: LoraConfig) -> dict[Projection, LoraTarget]:
    """Every projection that gets an adapter, and the target that says so."""
    found = {}
    for projection in projections(model):
        for target in adapters.targets:
            if any(projection.matches(pattern) for pattern in target.match):
                found[projection] = target
                break
    return found
