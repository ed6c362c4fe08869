"""What one layer keeps in memory from its forward to its backward pass, on one rank, tensor by tensor.

As the modules of mcore/ and megatron-core's unfused ones save it under the torch backend; benchmarks/memory_plan.py
counts the real tensors beside it. In the manner of Korthikanti et al. 2022 (arXiv 2205.05198, section 4), for modules
that keep less and with experts.
"""

#   H hidden, F width of a feed-forward network, K experts a token, N query heads, D head width

from dataclasses import dataclass

from megatron_ext.config import Layout, ModelConfig, ParallelConfig, Precision, RecomputeConfig
from megatron_ext.config.routing import expert_capacity

FULL_PRECISION = 4
_MASKED_QUERIES = 128
"""On CPU attention with more keys than queries has a mask, made for so many queries at a time."""


@dataclass(frozen=True)
class MicroBatch:
    """What one rank computes at a time."""

    rows: int
    """Samples."""
    length: int
    """Tokens a sample, of all context-parallel ranks."""
    on_cpu: bool = False
    """Kernels of the CPU keep copies and masks that those of a GPU do not need."""
    by_kernels: bool = False
    """Our own kernels compute SwiGLU and its gradient in one pass each (runtime.kernels: triton)."""
    compiled_router: bool = False
    """Routers are compiled (runtime.compile_router)."""
    imbalance: float = 1.0
    """Rows of the fullest expert-parallel rank over the mean."""


@dataclass(frozen=True)
class LayerMemory:
    """Bytes of one layer on one rank."""

    kept: float
    """Between its forward and its backward pass, its input included, its output not."""
    checkpoint: float
    """Of that, its input."""
    feed_forward: float
    """Of that, what the feed-forward network keeps, whose backward pass comes first."""
    working: float
    """What the backward pass of the feed-forward network needs beside."""
    working_attention: float
    """The same of attention."""
    lingers: bool
    """Whether a recomputed layer keeps its input, and that input's gradient, until the next micro-batch: token
    dispatchers of megatron-core hold on to what they were given last, and so to its graph."""


class LayerFormulas:
    """The formulas for one model, layout and micro-batch."""

    def __init__(
        self,
        model: ModelConfig,
        layout: Layout,
        parallel: ParallelConfig,
        precision: Precision,
        recompute: RecomputeConfig,
        micro: MicroBatch,
    ) -> None:
        self._model, self._layout, self._micro = model, layout, micro
        self._overlaps_shared = parallel.moe_shared_expert_overlap
        self.bytes = FULL_PRECISION if precision.kind == "fp32" else 2
        self._again = frozenset(recompute.modules if recompute.granularity == "selective" else ())
        self.tokens = micro.rows * micro.length / layout.cp
        """Of this rank's sequences."""
        self._sequence_split = layout.tp if parallel.sequence_parallel else 1
        self.residual = self.tokens / self._sequence_split * model.hidden_size * self.bytes
        """One tensor of the residual stream."""
        self.gathered = self.tokens * model.hidden_size * self.bytes
        """The same of all tokens of a tensor-parallel group."""

    def layer(self, *, is_moe: bool, has_window: bool = False) -> LayerMemory:
        """Bytes of a dense or a MoE layer, with or without a sliding window."""
        feed_forward = self._moe() if is_moe else self._dense()
        window = self._model.sliding_window if has_window else None
        window = None if window is None or window >= self._micro.length else window
        attention = self._latent_attention() if self._model.multi_latent_attention else self._attention(window)
        norms = 0.0 if "layernorm" in self._again else 2 * self._normed()
        dropped = 2 * self.residual / self.bytes if self._model.hidden_dropout else 0.0
        around = (
            2 * self.residual + norms + dropped
        )  # two inputs of norms: the residual stream before and after attention
        return LayerMemory(
            kept=around + attention + feed_forward,
            checkpoint=self.residual,
            feed_forward=feed_forward,
            working=(self._moe_working() if is_moe else self._dense_working()) + 2 * self.residual,
            working_attention=self._attention_working() + 3 * self.residual,
            lingers=is_moe and self._layout.ep * self._layout.etp > 1,
        )

    def _normed(self) -> float:
        """A norm's output and the scale that it keeps of each token in fp32."""
        return self.residual + self.tokens / self._sequence_split * FULL_PRECISION

    def _widths(self) -> tuple[float, float]:
        """Bytes of this rank's queries, and of its keys or values."""
        model, each = self._model, self.tokens * self.bytes / self._layout.tp
        return each * model.num_attention_heads * model.head_dim, each * model.query_groups * model.head_dim

    def _attention(self, window: int | None) -> float:
        """Grouped-query attention."""
        model, (query, key) = self._model, self._widths()
        rotates = model.position_embedding_type == "rope"
        angles = 4 * self._micro.length / self._layout.cp * model.rotary_width * self.bytes if rotates else 0.0
        rotated = query + key if rotates else 0.0
        sums = self.tokens * model.num_attention_heads / self._layout.tp * FULL_PRECISION
        normed, projected = 0.0, query + 2 * key
        # What attends by segments (mcore/attention_segments.py) has packed copies of what it sees.
        segments = self._layout.cp > 1 or window is not None or model.attention_sinks
        copies = segments or (self._micro.on_cpu and self.bytes == FULL_PRECISION)
        if model.qk_layernorm is not None:  # its inputs: queries, and of the keys all that the projection gave out
            normed = query + 2 * sums + (projected if copies and "core_attn" not in self._again else 0.0)
        if segments:
            keys = self._seen(window) * key
            # Where there are sinks, masks are made again.
            masks = self._masks(window) if self._micro.on_cpu and not model.attention_sinks else 0.0
            inside = query + 2 * keys + masks + sums + query
            return angles + normed + (rotated + query + 2 * key if "core_attn" in self._again else inside) + query
        if "core_attn" in self._again:
            return angles + normed + projected + rotated + query
        if copies:  # of all three, and of the output
            return angles + normed + projected + query + sums + query
        return angles + normed + projected + rotated + sums + query

    def _seen(self, window: int | None) -> float:
        """Tokens that a rank has keys of, over its own: of each of its two slices those that the slice sees."""
        slices = 2 * self._layout.cp
        if slices == 2:
            return 1.0
        width = self._micro.length / slices
        seen = [min((n + 1) * width, width + (window or self._micro.length) - 1) for n in range(slices)]
        return max(first + last for first, last in zip(seen, reversed(seen), strict=True)) / (2 * width)

    def _masks(self, window: int | None = None) -> float:
        """A CPU's masks of both slices of each sample; nothing masks the first slice of the sequence.

        A window's have so many rows at a time as there are masked queries.
        """
        if window is not None:
            near = min(window + _MASKED_QUERIES - 1, self._micro.length)
            return self._micro.rows * self._micro.length / self._layout.cp * near * self.bytes
        width = self._micro.length / (2 * self._layout.cp)
        seen = width * (2 * self._layout.cp + 1) - max(width - _MASKED_QUERIES, 0)
        return self._micro.rows * width * seen * self.bytes

    def _latent_attention(self) -> float:
        """Latent attention: both latent vectors before and after their norms, and whole queries, keys and values."""
        model, latent = self._model, self._model.multi_latent_attention
        assert latent is not None
        each, heads = self.tokens * self.bytes, model.num_attention_heads / self._layout.tp
        vectors = 2 * (latent.q_lora_rank or 0) + 2 * latent.kv_lora_rank + latent.qk_pos_emb_head_dim
        context, masks = heads * latent.v_head_dim, 0.0
        keys = heads * model.head_dim + context
        copied = context if self._micro.on_cpu and self.bytes == FULL_PRECISION else 0.0
        sums = self.tokens * heads * FULL_PRECISION
        if "core_attn" in self._again:
            copied = sums = 0.0
        elif self._layout.cp > 1:  # as for grouped-query attention
            keys, copied = (2 * self._layout.cp + 1) / 2 * keys, context
            masks = self._masks() if self._micro.on_cpu else 0.0
        angles = 4 * self._micro.length / self._layout.cp * latent.qk_pos_emb_head_dim * self.bytes
        inside = heads * model.head_dim + keys + context + copied
        return each * (vectors + inside) + masks + sums + angles

    def _attention_working(self) -> float:
        """Gradients of output, queries, keys and values, and of the projection that gave them out."""
        query, key = self._widths()
        return query + 2 * (query + 2 * key)

    def _matrices(self) -> float:
        """Widths kept of a feed-forward network: what is projected, and what is activated."""
        return 3.0 if self._model.gated_linear_unit else 2.0

    def _dense(self) -> float:
        if "mlp" in self._again:
            return 0.0
        return self._matrices() * self._dense_width()

    def _dense_width(self) -> float:
        return self.tokens * self._model.ffn_hidden_size / self._layout.tp * self.bytes

    def _dense_working(self) -> float:
        return self._network_working(self._model.ffn_hidden_size, again="mlp" in self._again)

    def _network_working(self, units: int, *, again: bool) -> float:
        """The most of two moments of a network for all tokens: activation, and the gradients of the first weight."""
        model, width = self._model, self.tokens * units / self._layout.tp * self.bytes
        kept = self._matrices() if again else 0.0
        rows = 2.0 if model.gated_linear_unit else 1.0
        weight = rows * model.hidden_size * units / self._layout.tp * self.bytes
        return kept * width + max(self._activation_working(weighted=False) * width, rows * width + weight)

    def _activation_working(self, *, weighted: bool) -> float:
        """Widths that the backward pass of an activation needs: the gradients of both ends, and what is between."""
        if not self._model.gated_linear_unit:
            return 3.0 if weighted else 2.0
        if self._micro.by_kernels and self._model.activation_func == "silu" and not self._beyond_swiglu():
            return 3.0
        return (6.0 if weighted else 5.0) + self._beyond_swiglu()

    def _beyond_swiglu(self) -> float:
        """Widths that the backward pass of a gated activation needs beyond that of SwiGLU (mcore/activation.py)."""
        model = self._model
        limited, shifted = model.activation_func_clamp_value is not None, model.glu_linear_offset != 0.0
        factors = 2.0 if limited else float(shifted)  # the gate that was cut, and what it is multiplied by
        return factors + (3.0 if model.activation_func == "quick_gelu" else 0.0)  # which is three steps of torch

    @property
    def rows(self) -> float:
        """Rows that the experts of the fullest rank get: one for each token and expert it is sent to, or filled up."""
        model, layout = self._model, self._layout
        factor, experts = model.moe_expert_capacity_factor, model.num_moe_experts
        if model.moe_pad_expert_input_to_capacity and factor is not None and experts is not None:
            tokens = self._micro.rows * self._micro.length
            return experts * min(expert_capacity(factor, tokens, model.moe_router_topk, experts), self.tokens)
        uneven = self._micro.imbalance if layout.ep > 1 else 1.0
        if factor is not None:
            uneven = min(uneven, max(factor, 1.0))
        return self.tokens / self._sequence_split * layout.etp * model.moe_router_topk * uneven

    def _row_bytes(self) -> tuple[float, float]:
        """Bytes of the rows at the width of the model, and at that of this rank's part of an expert."""
        model = self._model
        width = model.expert_ffn_hidden_size / self._layout.etp
        return self.rows * model.hidden_size * self.bytes, self.rows * width * self.bytes

    def _moe(self) -> float:
        return 0.0 if "moe" in self._again else self._router() + self._experts() + self._shared()

    def _router(self) -> float:
        """What it keeps of each token and expert, in fp32, and of each row; its input is the norm's output."""
        model = self._model
        assert model.num_moe_experts is not None
        normalized = 2 if model.moe_gating_normalization is not None else 0
        noisy = 1 if model.moe_router_noise is not None else 0
        # A compiled one may keep its logits instead of what is computed from them, and one tensor more.
        numbers = (2 + normalized + noisy + self._micro.compiled_router) * FULL_PRECISION + 1
        tokens = self.tokens / self._sequence_split
        return tokens * (model.num_moe_experts * numbers + model.moe_router_topk * 12) + self.rows * 20

    def _experts(self) -> float:
        hidden, width = self._row_bytes()
        activated = 0 if "moe_act" in self._again else 1
        return (
            hidden + (self._matrices() - (0 if activated else 1) + (0 if self._model.gated_linear_unit else 1)) * width
        )

    def _shared(self) -> float:
        if "shared_experts" in self._again:
            return 0.0
        # Overlapped ones are computed by megatron-core in steps, and what is between them is kept.
        overlapped = 4.0 if self._overlaps_shared and self._model.gated_linear_unit else 0.0
        return max(self._matrices(), overlapped) * self._shared_width()

    def _shared_width(self) -> float:
        return self.tokens * (self._model.moe_shared_expert_intermediate_size or 0) / self._layout.tp * self.bytes

    def _moe_working(self) -> float:
        """The most of three moments: activation, the gradients of the second weight, and of the first."""
        model, (hidden, width) = self._model, self._row_bytes()
        again = self._router() + self._experts() + self._shared() if "moe" in self._again else 0.0
        experts = (model.num_moe_experts or 0) / self._layout.ep
        gated = 2 if model.gated_linear_unit else 1
        weight = experts * model.hidden_size * model.expert_ffn_hidden_size / self._layout.etp * self.bytes
        second = hidden + width + weight
        first = hidden + gated * width + gated * weight - width  # what was activated is free by then
        # What came over the group stays until its own backward pass is over.
        arrived = hidden if self._layout.ep > 1 else 0.0
        moments = [self._activation_working(weighted=True) * width + arrived, second, first]
        if (etp := self._layout.etp) > 1:  # the forward pass sums the parts of each row in fp32
            moments.append(hidden * FULL_PRECISION / self.bytes * (1 + 1 / etp))
        units = model.moe_shared_expert_intermediate_size or 0
        shared = self._network_working(units, again="shared_experts" in self._again)
        return again + max(max(moments) + self._shared_width(), shared)
