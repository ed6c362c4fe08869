"""The catalogue of a model's tensors: canonical name, global shape, placement and initial values of each.

Planning, initialisation, checkpoints and conversion all read it: a tensor that is not here is unknown to every one of
them. Canonical names are those of naming.py: unfused norms, one entry an expert, vocabulary padded.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_ext.config import LearnedNoise, ModelConfig

Shape = tuple[int, ...]

EMBEDDING = "embedding.word_embeddings.weight"
POSITIONS = "embedding.position_embeddings.weight"
OUTPUT = "output_layer.weight"

IN_FP32 = re.compile(r"decoder\.layers\.\d+\.mlp\.router\.expert_bias")
"""Tensors that are in fp32 in every checkpoint: an expert's bias moves in steps of 1e-3, which bf16 would lose."""


@dataclass(frozen=True)
class Normal:
    """Initial values: normal with this mean and standard deviation; constant where the deviation is 0."""

    mean: float
    std: float


@dataclass(frozen=True)
class Uniform:
    """Initial values: uniform between -bound and bound."""

    bound: float


ZEROS, ONES = Normal(0.0, 0.0), Normal(1.0, 0.0)


@dataclass(frozen=True)
class CanonicalTensor:
    """One tensor of the model, whole."""

    name: str
    shape: Shape
    initial: Normal | Uniform
    tp_dimension: int | None
    """The dimension that tensor parallelism splits (of a routed expert: expert tensor parallelism); None: replicated.
    The two matrices of a gated fc1 stand one after the other in that dimension, and each is split by itself."""
    layer: int | None = None
    """The decoder layer it belongs to, counted from 0."""
    is_expert: bool = False
    """Whether it belongs to a routed expert, so that expert parallelism places it."""

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


Tensors = Iterator[CanonicalTensor]


def model_tensors(model: ModelConfig) -> dict[str, CanonicalTensor]:
    """Every weight of `model` by canonical name, in the order of the computation."""
    return {tensor.name: tensor for tensor in _tensors(model)}


def model_shapes(model: ModelConfig) -> dict[str, Shape]:
    """The global shape of every weight of `model` by canonical name."""
    return {tensor.name: tensor.shape for tensor in _tensors(model)}


def _tensors(model: ModelConfig) -> Tensors:
    hidden, table = model.hidden_size, (model.padded_vocab_size, model.hidden_size)
    normal = Normal(0.0, model.init_method_std)
    yield CanonicalTensor(EMBEDDING, table, normal, 0)
    if model.position_embedding_type == "learned_absolute":
        yield CanonicalTensor(POSITIONS, (model.max_position_embeddings, hidden), normal, None)
    for layer, is_moe in enumerate(model.moe_layer_pattern):
        yield from _Layer(model, layer).tensors(is_moe=is_moe)
    yield from _norm(model, "decoder.final_layernorm", hidden)
    if model.untie_embeddings_and_output_weights:
        yield CanonicalTensor(OUTPUT, table, normal, 0)


def _norm(model: ModelConfig, name: str, width: int, layer: int | None = None) -> Tensors:
    yield CanonicalTensor(f"{name}.weight", (width,), ONES, None, layer)
    if model.normalization == "LayerNorm":
        yield CanonicalTensor(f"{name}.bias", (width,), ZEROS, None, layer)


class _Layer:
    """The tensors of one decoder layer."""

    def __init__(self, model: ModelConfig, layer: int) -> None:
        self._model, self._layer = model, layer
        self._normal = Normal(0.0, model.init_method_std)
        # Layers that write to the residual stream begin smaller, as Megatron initialises.
        self._residual = Normal(0.0, model.init_method_std / math.sqrt(2 * model.num_layers))

    def tensors(self, *, is_moe: bool) -> Tensors:
        model, prefix = self._model, f"decoder.layers.{self._layer}"
        yield from self._norm(f"{prefix}.input_layernorm", model.hidden_size)
        attention = self._latent_attention if model.multi_latent_attention else self._attention
        yield from attention(f"{prefix}.self_attention")
        yield from self._norm(f"{prefix}.pre_mlp_layernorm", model.hidden_size)
        if is_moe:
            yield from self._moe(f"{prefix}.mlp")
        else:
            yield from self._feed_forward(f"{prefix}.mlp", model.ffn_hidden_size)

    def _norm(self, name: str, width: int) -> Tensors:
        yield from _norm(self._model, name, width, self._layer)

    def _weight(self, name: str, shape: Shape, initial: Normal, tp: int | None = None) -> CanonicalTensor:
        return CanonicalTensor(name, shape, initial, tp, self._layer)

    def _column(self, name: str, rows: int, columns: int, *, bias: bool = False, is_expert: bool = False) -> Tensors:
        """A linear layer whose outputs are split, and its bias with them."""
        yield CanonicalTensor(f"{name}.weight", (rows, columns), self._normal, 0, self._layer, is_expert)
        if bias:
            yield CanonicalTensor(f"{name}.bias", (rows,), ZEROS, 0, self._layer, is_expert)

    def _row(self, name: str, rows: int, columns: int, *, bias: bool = False, is_expert: bool = False) -> Tensors:
        """A linear layer whose inputs are split; it writes to the residual stream, and its bias is added once.

        Of an expert each rank adds its part of the bias, so that the sum over ranks has it once.
        """
        yield CanonicalTensor(f"{name}.weight", (rows, columns), self._residual, 1, self._layer, is_expert)
        if bias:
            yield CanonicalTensor(f"{name}.bias", (rows,), ZEROS, 0 if is_expert else None, self._layer, is_expert)

    def _attention(self, prefix: str) -> Tensors:
        model, hidden, head = self._model, self._model.hidden_size, self._model.head_dim
        queries, keys = model.num_attention_heads * head, model.query_groups * head
        yield from self._column(f"{prefix}.linear_qkv", queries + 2 * keys, hidden, bias=model.has_qkv_bias)
        if model.qk_layernorm == "head":
            yield from self._norm(f"{prefix}.q_layernorm", head)
            yield from self._norm(f"{prefix}.k_layernorm", head)
        elif model.qk_layernorm == "projection":
            yield self._weight(f"{prefix}.q_layernorm.weight", (queries,), ONES, tp=0)
            yield self._weight(f"{prefix}.k_layernorm.weight", (keys,), ONES, tp=0)
        if model.attention_sinks:
            yield self._weight(f"{prefix}.core_attention.softmax_offset", (model.num_attention_heads,), self._normal, 0)
        yield from self._row(f"{prefix}.linear_proj", hidden, queries, bias=model.add_bias_linear)

    def _latent_attention(self, prefix: str) -> Tensors:
        """The projections to latent vectors are replicated, those from them split by heads."""
        model, latent, hidden = self._model, self._model.multi_latent_attention, self._model.hidden_size
        assert latent is not None
        heads, normal = model.num_attention_heads, self._normal
        if latent.q_lora_rank is None:
            yield from self._column(f"{prefix}.linear_q_proj", heads * model.head_dim, hidden)
        else:
            yield self._weight(f"{prefix}.linear_q_down_proj.weight", (latent.q_lora_rank, hidden), normal)
            yield from self._norm(f"{prefix}.q_layernorm", latent.q_lora_rank)
            yield from self._column(f"{prefix}.linear_q_up_proj", heads * model.head_dim, latent.q_lora_rank)
        compressed = latent.kv_lora_rank + latent.qk_pos_emb_head_dim
        yield self._weight(f"{prefix}.linear_kv_down_proj.weight", (compressed, hidden), normal)
        yield from self._norm(f"{prefix}.kv_layernorm", latent.kv_lora_rank)
        keys_and_values = heads * (latent.qk_head_dim + latent.v_head_dim)
        yield from self._column(f"{prefix}.linear_kv_up_proj", keys_and_values, latent.kv_lora_rank)
        yield from self._row(f"{prefix}.linear_proj", hidden, heads * latent.v_head_dim)

    def _feed_forward(self, prefix: str, width: int, *, is_expert: bool = False) -> Tensors:
        model, biased = self._model, self._model.add_bias_linear
        rows = 2 * width if model.gated_linear_unit else width
        yield from self._column(f"{prefix}.linear_fc1", rows, model.hidden_size, bias=biased, is_expert=is_expert)
        yield from self._row(f"{prefix}.linear_fc2", model.hidden_size, width, bias=biased, is_expert=is_expert)

    def _moe(self, prefix: str) -> Tensors:
        model, experts, hidden = self._model, self._model.num_moe_experts, self._model.hidden_size
        assert experts is not None
        yield self._weight(f"{prefix}.router.weight", (experts, hidden), self._normal)
        if model.moe_router_linear_bias:
            yield self._weight(f"{prefix}.router.bias", (experts,), ZEROS)
        if model.moe_router_enable_expert_bias:
            yield self._weight(f"{prefix}.router.expert_bias", (experts,), ZEROS)
        if isinstance(model.moe_router_noise, LearnedNoise):
            yield self._weight(f"{prefix}.router.noise_weight", (experts, hidden), ZEROS)
        for expert in range(experts):
            yield from self._feed_forward(f"{prefix}.experts.{expert}", model.expert_ffn_hidden_size, is_expert=True)
        if model.moe_shared_expert_intermediate_size is not None:
            yield from self._feed_forward(f"{prefix}.shared_experts", model.moe_shared_expert_intermediate_size)
        if model.moe_shared_expert_gate:
            yield self._weight(f"{prefix}.shared_experts.gate_weight", (1, hidden), self._normal)
