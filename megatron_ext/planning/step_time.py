"""How long a step takes, predicted: products, memory traffic, messages, the pipeline's bubble.

A sum of what has to be done over the rates of `Assumptions`. On one H100 it is within a tenth of what was measured
(benchmarks/RESULTS.md, "One GPU"); nothing of several GPUs was measured by us: those figures are predictions.
"""

#   T tokens of a rank's micro-batch, H hidden, F width of a feed-forward network, K experts a token, V vocabulary

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ext.canonical.placement import stage_of_layer
from megatron_ext.config import Layout, RunConfig
from megatron_ext.config.layout import StepShape
from megatron_ext.planning.assumptions import Assumptions
from megatron_ext.planning.flops import attended_keys, attention_products, training_flops_per_token
from megatron_ext.planning.layer_memory import LayerFormulas, MicroBatch
from megatron_ext.planning.memory import StateMemory

_BACKWARD = 2
"""Backward over forward, in products."""

# Bytes that the elementwise kernels of the torch backend read and write in bf16, forward and backward, counted kernel
# by kernel as they stand there; fused ones need a half or a third.
_NORM_RESIDUAL = 52
"""Of a token and hidden unit: both norms, both residual sums and their gradients."""
_ROTARY = 44
"""Of a token and channel of queries and keys: cos, sin, negate, concatenate, two products and a sum."""
_GATED = 36
"""Of a token and unit of a dense gated network: the gate's activation times the other half."""
_GATED_WEIGHTED = 62
"""Of a row and unit of a routed expert: the same times the routing weight."""
_DISPATCHED = 12
"""Of a row and hidden unit: gathered to the experts and summed again."""
_MOE_TOKEN = 48
"""Of a token and hidden unit of an MoE layer beside its rows: the router's fp32 input, gradients of what forks."""
_ROUTED = 240
"""Of a token and expert: the router's fp32 scores, selection and loss."""
_WEIGHT_GRADIENT = 12
"""Of a weight and micro-batch: a bf16 gradient added to its fp32 sum."""
_CROSS_ENTROPY = 66
"""Of a token and vocabulary entry: about twenty kernels a block of logits."""
_KERNEL_GATED, _KERNEL_CROSS_ENTROPY = 16, 6
"""The same of a gated network, with routing weights or without, and of the loss by our own kernels (mcore/kernels/)."""
_UPDATE = 42
"""Of a parameter and step: Adam in fp32, the gradient's norm, zeros and copies."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step on the slowest pipeline stage."""

    compute: float
    """Products and memory traffic of all micro-batches."""
    messages: float
    """Tensor, context, expert and pipeline parallelism of all micro-batches."""
    host: float
    """Waits for activations on their way to and from the host's memory, of all micro-batches."""
    bubble: float
    """Waiting for the pipeline to fill and to drain."""
    data_parallel: float
    """Gradients and weights between data-parallel ranks, as far as they wait for it."""
    optimizer: float
    """The update."""
    tokens: int
    """Of the global batch."""
    model_flops: float
    """Of all ranks, recomputed ones not counted."""
    world_size: int

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.compute + self.messages + self.host + self.bubble + self.data_parallel + self.optimizer

    @property
    def tflops(self) -> float:
        """Model TFLOP/s a GPU."""
        return self.model_flops / self.seconds / self.world_size / 1e12


def step_time(
    run: RunConfig, layout: Layout, states: Sequence[StateMemory], shape: StepShape, assumed: Assumptions
) -> StepTime:
    """Predict a step of `run` that is like `shape`.

    Args:
        states: of each pipeline stage (planning/memory.py).
    """
    cost = _Cost(run, layout, shape, assumed)
    kinds, moved = ([[0, 0] for _ in range(layout.pp)] for _ in range(2))
    before: dict[int, int] = {}
    for layer, is_moe in enumerate(run.model.moe_layer_pattern):
        chunk = stage_of_layer(layer, run.model, run.parallel)
        before[chunk] = before.get(chunk, 0) + 1
        kinds[chunk % layout.pp][is_moe] += 1
        moved[chunk % layout.pp][is_moe] += before[chunk] <= run.recompute.offload_layers
    stages = {(tuple(kinds[stage]), tuple(moved[stage]), stage == layout.pp - 1) for stage in range(layout.pp)}
    compute, messages, host = max((cost.stage(*stage) for stage in stages), key=sum)
    number = max(shape.size // (shape.micro_size * layout.dp), 1)
    chunks = run.parallel.virtual_pipeline_model_parallel_size or 1
    # Narayanan et al. 2021 (arXiv 2104.04473), section 2.2: (p - 1) / v of a micro-batch's time.
    bubble = (layout.pp - 1) / chunks * (compute + messages + host)
    return StepTime(
        compute=number * compute,
        messages=number * messages,
        host=number * host,
        bubble=bubble,
        data_parallel=max(cost.data_parallel(state) for state in states),
        optimizer=max(cost.update(state) for state in states),
        tokens=shape.size * shape.length,
        model_flops=shape.size * shape.length * training_flops_per_token(run.model, shape.length, run.adapters),
        world_size=layout.world_size,
    )


class _Cost:
    """Seconds of one micro-batch, forward and backward."""

    def __init__(self, run: RunConfig, layout: Layout, shape: StepShape, assumed: Assumptions) -> None:
        self._run, self._model, self._layout, self._assumed = run, run.model, layout, assumed
        self._length = shape.length
        self._tokens = shape.micro_size * shape.length / layout.cp
        self._bytes = 4 if run.precision.kind == "fp32" else 2
        self._peak = assumed.peak_tflops * 1e12 * (1 if self._bytes == 2 else 0.5)
        self._is_fp8 = run.precision.kind == "fp8"
        self._gated, self._gated_weighted, self._loss = _GATED, _GATED_WEIGHTED, _CROSS_ENTROPY
        if run.runtime.kernels == "triton":
            self._loss = _KERNEL_CROSS_ENTROPY
            if run.model.gated_linear_unit and run.model.activation_func == "silu":
                self._gated = self._gated_weighted = _KERNEL_GATED
        full, selective = (run.recompute.granularity == kind for kind in ("full", "selective"))
        modules = run.recompute.modules if selective else []
        self._all_again = full
        self._network_again = full or bool({"mlp", "moe"} & set(modules))

    def stage(self, layers: tuple[int, ...], moved: tuple[int, ...], is_last: bool) -> tuple[float, float, float]:
        """Compute, messages and waits for the host of a pipeline stage.

        Args:
            layers: how many dense ones and how many with experts it has.
            moved: of how many of either kind the host keeps the activations.
        """
        layout = self._layout
        compute = messages = host = 0.0
        for is_moe, count, there in zip((False, True), layers, moved, strict=True):
            if count:
                layer = self._layer(is_moe=is_moe)
                compute += count * layer
                messages += count * self._layer_messages(is_moe=is_moe)
                host += there * self._host_waits(layer * self._assumed.slack, is_moe=is_moe) if there else 0.0
        if is_last:
            compute += self._head()
        if layout.pp > 1:
            sent = self._residual / self._rate(layout.tp * layout.cp * layout.dp * 2)
            messages += 2 * sent * (self._run.parallel.virtual_pipeline_model_parallel_size or 1)
        return compute * self._assumed.slack, messages, host

    def _host_waits(self, layer: float, *, is_moe: bool) -> float:
        """How much longer what a layer keeps travels than its neighbour computes, out and in.

        Args:
            layer: seconds of forward and backward pass together.
        """
        run, assumed = self._run, self._assumed
        rows = round(self._tokens * self._layout.cp / self._length)
        micro = MicroBatch(
            rows,
            self._length,
            by_kernels=run.runtime.kernels == "triton",
            compiled_router=run.runtime.compile_router,
            imbalance=assumed.expert_imbalance,
        )
        formulas = LayerFormulas(run.model, self._layout, run.parallel, run.precision, run.recompute, micro)
        travels = formulas.layer(is_moe=is_moe).kept / (assumed.host_gb_s * 1e9)
        forward = layer / (1 + _BACKWARD)
        return max(travels - forward, 0.0) + max(travels - (layer - forward), 0.0)

    @property
    def _residual(self) -> float:
        split = self._layout.tp if self._run.parallel.sequence_parallel else 1
        return self._tokens / split * self._model.hidden_size * self._bytes

    def _product(self, multiply_adds: float, share: float, fp8: float) -> float:
        """Forward and backward of so many multiply-adds."""
        return 6 * multiply_adds / (self._peak * share * (fp8 if self._is_fp8 else 1))

    def _layer(self, *, is_moe: bool) -> float:
        attention, network = self._attention(), self._experts() if is_moe else self._dense()
        again = (attention if self._all_again else 0.0) + (network if self._network_again else 0.0)
        return attention + network + again / (1 + _BACKWARD)

    def _attention(self) -> float:
        """Projections, attention itself, norms and residuals."""
        model, layout, assumed = self._model, self._layout, self._assumed
        hidden, latent = model.hidden_size, model.multi_latent_attention
        queries, keys = model.num_attention_heads * model.head_dim, model.query_groups * model.head_dim
        values = queries if latent is None else model.num_attention_heads * latent.v_head_dim
        weights = attention_products(model, 0)
        tokens = self._tokens / layout.tp
        scores = tokens * (queries + values) * attended_keys(model, self._length)
        # The backward pass of attention has five products to the forward pass's two.
        core = 2 * scores * (1 + 2.5) / (self._peak * assumed.attention)
        split = layout.tp if self._run.parallel.sequence_parallel else 1
        moved = _NORM_RESIDUAL * self._tokens / split * hidden + _ROTARY * tokens * (queries + keys)
        return self._product(tokens * weights, assumed.products, assumed.fp8_products) + core + self._moved(moved)

    def _moved(self, numbers_times_bytes: float) -> float:
        """Memory traffic of the torch backend in bf16, forward and backward."""
        scale = self._bytes / 2 * self._assumed.traffic
        return numbers_times_bytes * scale / (self._assumed.memory_tb_s * 1e12)

    def _dense(self, width: int | None = None) -> float:
        model, tokens = self._model, self._tokens / self._layout.tp
        width = model.ffn_hidden_size if width is None else width
        matrices = 3 if model.gated_linear_unit else 2
        products = tokens * matrices * model.hidden_size * width
        gradients = _WEIGHT_GRADIENT * matrices * model.hidden_size * width / self._layout.tp
        return self._product(products, self._assumed.products, self._assumed.fp8_products) + self._moved(
            self._gated * tokens * width + gradients
        )

    def _experts(self) -> float:
        model, layout, assumed = self._model, self._layout, self._assumed
        uneven = assumed.expert_imbalance if layout.ep > 1 else 1.0
        split = layout.tp if self._run.parallel.sequence_parallel else 1
        rows = self._tokens / split * layout.etp * model.moe_router_topk * uneven
        if model.moe_pad_expert_input_to_capacity:
            rows *= min(model.moe_expert_capacity_factor or 1.0, (model.num_moe_experts or 1) / model.moe_router_topk)
        width = model.expert_ffn_hidden_size / layout.etp
        matrices = 3 if model.gated_linear_unit else 2
        experts = (model.num_moe_experts or 0) / layout.ep
        gradients = _WEIGHT_GRADIENT * experts * matrices * model.hidden_size * width
        moved = self._gated_weighted * rows * width + _DISPATCHED * rows * model.hidden_size + gradients
        moved += self._tokens / split * (_MOE_TOKEN * model.hidden_size + _ROUTED * (model.num_moe_experts or 0))
        shared = self._dense(model.moe_shared_expert_intermediate_size or 0)
        products = rows * matrices * model.hidden_size * width
        return (
            self._product(products, assumed.grouped_products, assumed.fp8_grouped)
            + self._moved(moved)
            + shared
            + (experts * assumed.expert_launch_us * 1e-6)
        )

    def _head(self) -> float:
        """Output layer, loss and the gradient of both tables."""
        model, tokens = self._model, self._tokens / self._layout.tp
        vocabulary = model.padded_vocab_size
        # The tables of both ends have their gradient.
        gradients = 2 * _WEIGHT_GRADIENT * vocabulary * model.hidden_size / self._layout.tp
        moved = self._loss * tokens * vocabulary + gradients
        again = 2 if self._run.recompute.logits else 0
        products = (6 + again) * tokens * vocabulary * model.hidden_size
        return products / (self._peak * self._assumed.products) + self._moved(moved)

    def _rate(self, ranks: int) -> float:
        """Bytes a second within a group that spans so many neighbouring ranks."""
        within = ranks <= self._assumed.gpus_per_node
        return (self._assumed.node_gb_s if within else self._assumed.network_gb_s) * 1e9

    def _layer_messages(self, *, is_moe: bool) -> float:
        model, layout = self._model, self._layout
        gathered = self._tokens * model.hidden_size * self._bytes
        passes = 1.5 if self._all_again else 1.0  # the forward pass once more
        split_parts = 1 + (not is_moe or bool(model.moe_shared_expert_intermediate_size))
        # Gather and scatter forward and backward, and gather again for the weights' gradients.
        tensor = split_parts * 5 * passes * gathered * (layout.tp - 1) / layout.tp / self._rate(layout.tp)
        keys = 2 * self._tokens * model.query_groups * model.head_dim / layout.tp * self._bytes
        context = 2 * passes * keys * (layout.cp - 1) / self._rate(layout.tp * layout.cp)
        if not is_moe:
            return tensor + context
        experts = self._expert_messages() * (1.5 if self._network_again else 1.0)
        if self._run.parallel.moe_shared_expert_overlap:
            experts -= min(experts, self._dense(model.moe_shared_expert_intermediate_size))
        return tensor + context + experts

    def _expert_messages(self) -> float:
        """To the experts and back, forward and backward; the slower of both kinds of links counts."""
        model, layout, assumed = self._model, self._layout, self._assumed
        split = layout.tp if self._run.parallel.sequence_parallel else 1
        row = model.hidden_size * self._bytes
        uneven = assumed.expert_imbalance if layout.ep > 1 else 1.0
        each = self._tokens / split * row
        if self._run.parallel.moe_token_dispatcher_type == "allgather":
            return 4 * each * (layout.ep * layout.etp - 1) / self._rate(layout.ep * layout.etp)
        rows = each * model.moe_router_topk * uneven
        group = layout.ep * layout.etp
        outside = max(0.0, 1 - assumed.gpus_per_node / group)
        inside = (layout.ep - 1) / layout.ep - outside
        if self._run.parallel.flex_backend is not None:
            # Once to each other node that has one of a token's experts, and on from there within it (DeepSeek-V3,
            # arXiv 2412.19437, section 3.2.2): of n nodes K random experts are on n (1 - (1 - 1/n)^K).
            nodes = max(group / assumed.gpus_per_node, 1.0)
            met = nodes * (1 - (1 - 1 / nodes) ** model.moe_router_topk) / model.moe_router_topk
            inside, outside = inside + outside, outside * met
        exchange = rows * max(outside / assumed.network_gb_s, max(inside, 0.0) / assumed.node_gb_s) / 1e9
        parts = rows * (layout.etp - 1) * (1 + 4 / self._bytes) / self._rate(layout.etp)
        return 4 * exchange + 2 * parts

    def data_parallel(self, state: StateMemory) -> float:
        """Gradients summed in fp32 and weights gathered, once a step."""
        layout, assumed = self._layout, self._assumed
        parallel = self._run.parallel.settled(on_cuda=True, copies=layout.dp * layout.cp)

        def wait(parameters: float, ranks: int) -> float:
            if ranks <= 1:
                return 0.0
            rate = self._rate(layout.tp * layout.cp * layout.dp)
            moved = parameters * (ranks - 1) / ranks / rate
            reduce = assumed.exposed_overlap if parallel.overlap_grad_reduce else 1.0
            gather = assumed.exposed_overlap if parallel.overlap_param_gather else 1.0
            if not parallel.use_distributed_optimizer:
                return moved * 8 * reduce
            return moved * (4 * reduce + self._bytes * gather)

        return wait(state.dense, layout.dp * layout.cp) + wait(state.experts, layout.edp)

    def update(self, state: StateMemory) -> float:
        """The optimizer's step of this rank's share; moments that the host keeps come from it and go back."""
        layout, assumed, run = self._layout, self._assumed, self._run
        splits = run.parallel.use_distributed_optimizer
        dense_share, expert_share = (layout.dp * layout.cp, layout.edp) if splits else (1, 1)
        updated = state.dense / dense_share + state.experts / expert_share
        crossing = 2 * run.optimizer.moment_bytes if run.optimizer.moments_on_host else 0
        each = _UPDATE / (assumed.memory_tb_s * 1e12) + crossing / (assumed.host_gb_s * 1e9)
        return assumed.slack * updated * each
