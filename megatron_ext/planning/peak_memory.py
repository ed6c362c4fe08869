"""The most memory that a rank needs at any moment of a step: state, activations in flight, loss, buffers."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_ext.canonical.placement import stage_of_layer
from megatron_ext.config import Layout, RunConfig
from megatron_ext.planning.layer_memory import FULL_PRECISION, LayerFormulas, LayerMemory, MicroBatch
from megatron_ext.planning.memory import StateMemory, stage_states

_LOSS_BLOCK = {True: 2**22, False: 2**27}
"""Numbers of the logits that the loss turns into fp32 at a time, on CPU and elsewhere (mcore/cross_entropy.py)."""

_OPTIMIZER_BLOCK = 2**26
"""Parameters that a step updates at a time where moments are kept otherwise than it takes them."""


@dataclass(frozen=True)
class PeakMemory:
    """Bytes on the rank that needs most, at the moment it does."""

    stage: int
    """Its pipeline stage."""
    state: int
    """Weights, gradients and optimizer."""
    kept: float
    """Activations that wait for their backward pass."""
    working: float
    """What is computed with at that moment: a layer's gradients, or logits and loss."""
    buffers: float
    """What communication keeps, the tokens of the step, and weights in fp8 that all its micro-batches take."""
    in_flight: float
    """Micro-batches of which the stage keeps activations at once."""
    on_host: float
    """In the host's page-locked memory, at most: activations of the layers that are moved there, and moments."""

    @property
    def activations(self) -> float:
        """All that is no state."""
        return self.kept + self.working + self.buffers

    @property
    def total(self) -> float:
        """All of it."""
        return self.state + self.activations


def peak_memory(
    run: RunConfig,
    layout: Layout,
    states: Sequence[StateMemory] | None = None,
    *,
    on_cpu: bool = False,
    imbalance: float = 1.0,
) -> PeakMemory:
    """What `run` needs on the fullest rank of `layout`, for the most demanding of its kinds of steps.

    Without what a device's libraries and allocator take for themselves. Weights beside which adapters are trained, and
    the backend's fused kernels, need less than is said here; attention dropout, and sinks in bf16, on a CPU need more.

    Args:
        states: of each pipeline stage, where they are known.
        on_cpu: computed by the kernels of a CPU.
        imbalance: rows of the fullest expert-parallel rank over the mean.
    """
    states = states or stage_states(run, layout)
    by_kernels, compiled = run.runtime.kernels == "triton", run.runtime.compile_router
    micro_batch = MicroBatch(0, 0, on_cpu, by_kernels, compiled, imbalance)
    shapes = {
        (shape.micro_size, shape.length, shape.size // (shape.micro_size * layout.dp)) for shape in run.step_shapes
    }
    peaks = [
        _Stage(run, layout, stage, replace(micro_batch, rows=rows, length=length), number).peak(states[stage])
        for rows, length, number in shapes
        for stage in range(layout.pp)
    ]
    return max(peaks, key=lambda peak: peak.total)


class _Stage:
    """One pipeline stage under one kind of step."""

    def __init__(self, run: RunConfig, layout: Layout, stage: int, micro: MicroBatch, micro_batches: int) -> None:
        self._run, self._layout, self._stage, self._micro = run, layout, stage, micro
        self._micro_batches = max(micro_batches, 1)
        self._formulas = LayerFormulas(run.model, layout, run.parallel, run.precision, run.recompute, micro)
        self._layers = list(zip(run.model.moe_layer_pattern, run.model.window_layer_pattern, strict=True))
        self._kinds = {kind: self._formulas.layer(is_moe=kind[0], has_window=kind[1]) for kind in set(self._layers)}
        self._is_first, self._is_last = stage == 0, stage == layout.pp - 1
        self._chunks = self._layers_of_chunks()
        self._moved = [self._moved_of(chunk, layers) for chunk, layers in enumerate(self._chunks)]

    def _layers_of_chunks(self) -> list[list[LayerMemory]]:
        model, parallel = self._run.model, self._run.parallel
        chunks: list[list[LayerMemory]] = [[] for _ in range(parallel.virtual_pipeline_model_parallel_size or 1)]
        for layer, kind in enumerate(self._layers):
            virtual = stage_of_layer(layer, model, parallel)
            if virtual % self._layout.pp == self._stage:
                chunks[virtual // self._layout.pp].append(self._kinds[kind])
        return chunks

    def _moved_of(self, chunk: int, layers: Sequence[LayerMemory]) -> list[float]:
        """Of what each layer of a chunk keeps, that which is in the host's memory until its backward pass."""
        count = self._run.recompute.offload_layers
        moved = [layer.kept if number < count else 0.0 for number, layer in enumerate(layers)]
        if count and layers and not (self._is_first and chunk == 0):
            moved[0] -= layers[0].checkpoint  # the schedule keeps what another stage has sent
        return moved

    def peak(self, state: StateMemory) -> PeakMemory:
        """The most of all moments, beside the state."""
        moments = list(self._moments())
        if (
            self._micro.on_cpu
            and self._run.parallel.use_distributed_optimizer
            and self._layout.dp * self._layout.cp > 1
        ):
            moments.append(
                (0.0, 4.0 * max(state.dense, state.experts), 0.0)
            )  # Gloo scatters sums by a copy of all of them
        if self._run.optimizer.moments_on_host or self._run.optimizer.moment_bytes < 2 * FULL_PRECISION:
            # Both of a block of parameters in fp32 (mcore/optimizer.py).
            moments.append((0.0, 2.0 * FULL_PRECISION * min(state.parameters, _OPTIMIZER_BLOCK), 0.0))
        kept, working, count = max(moments, key=lambda moment: moment[0] + moment[1])
        buffers = self._buffers() + state.kept_fp8
        on_host = self._activations_on_host() + state.on_host
        return PeakMemory(self._stage, state.bytes, kept, working, buffers, count, on_host)

    def _activations_on_host(self) -> float:
        """Of all micro-batches in flight, when those are most."""
        each = [sum(moved) for moved in self._moved]
        if not any(each):
            return 0.0
        flights = (zip(in_flight, each, strict=True) for in_flight in self._in_flight())
        return max(sum(count * moved for count, moved in flight) for flight in flights)

    def _moments(self) -> Iterator[tuple[float, float, float]]:
        """Activations kept, memory worked with, and micro-batches in flight, when a backward pass begins a layer."""
        kept = [self._kept(*both) for both in zip(self._chunks, self._moved, strict=True)]
        for in_flight in set(self._in_flight()):
            total = sum(count * each for count, each in zip(in_flight, kept, strict=True))
            count = sum(in_flight) / len(kept)
            for chunk, layers in enumerate(self._chunks):
                if not in_flight[chunk]:
                    continue
                is_last = self._is_last and chunk == len(self._chunks) - 1
                moved = self._moved[chunk]
                if is_last:  # whose last layer's are needed before they are gone
                    yield total + self._formulas.residual + sum(moved[-1:]), self._loss(), count
                yield from ((total - less, working, count) for less, working in self._backward(layers, moved))
                if self._is_first and chunk == 0:
                    yield total - kept[0], self._table() + self._formulas.gathered, count

    def _kept(self, layers: Sequence[LayerMemory], moved: Sequence[float]) -> float:
        """Of one micro-batch in one chunk; the chunk's output too, which the next stage or the loss has got."""
        output = self._formulas.residual
        recompute = self._run.recompute
        if recompute.granularity != "full":
            return output + sum(layer.kept for layer in layers) - sum(moved)
        if recompute.method == "uniform":
            return output + math.ceil(len(layers) / recompute.num_layers) * self._formulas.residual
        first = layers[: recompute.num_layers]
        return output + sum(x.checkpoint for x in first) + sum(x.kept for x in layers[recompute.num_layers :])

    def _backward(self, layers: Sequence[LayerMemory], moved: Sequence[float]) -> Iterator[tuple[float, float]]:
        """At each layer from the last on: what is free already, and what is worked with beside it."""
        recompute = self._run.recompute
        group = recompute.num_layers if recompute.method == "uniform" else 1
        freed = 0.0
        for number in reversed(range(len(layers))):
            layer = layers[number]
            # What was moved has come back, and that of the layer before is on its way.
            again = moved[number] + (moved[number - 1] if number else 0.0)
            recomputed = recompute.granularity == "full" and (
                recompute.method == "uniform" or number < recompute.num_layers
            )
            if recomputed:
                start = number // group * group
                again = sum(x.kept for x in layers[start : number + 1])
            yield freed, again + layer.working
            yield freed, again - layer.feed_forward + layer.working_attention
            if not recomputed:
                freed += layer.kept - moved[number]
            elif number % group == 0:
                freed += -layer.checkpoint if layer.lingers else layer.checkpoint

    def _in_flight(self) -> list[tuple[int, ...]]:
        """How many micro-batches each chunk keeps, at the moments when a backward pass begins.

        One forward, one backward: a stage goes ahead by as many micro-batches as there are stages after it. Interleaved
        (Narayanan et al. 2021, arXiv 2104.04473, section 2.2) it goes through the chunks with groups of as many
        micro-batches as there are stages.
        """
        pp, chunks, total = self._layout.pp, len(self._chunks), self._micro_batches
        if chunks == 1:
            return [(min(pp - self._stage, total),)]
        ahead = min((pp - self._stage - 1) * 2 + (chunks - 1) * pp, total * chunks)
        # The pattern repeats with each group of micro-batches.
        steps = min(total * chunks, ahead + 1 + 2 * pp * chunks)
        forward = [step // pp % chunks for step in range(steps)]
        backward = [chunks - 1 - step // pp % chunks for step in range(steps)]
        found, counts = [], [0] * chunks
        for step, chunk in enumerate(forward):
            counts[chunk] += 1
            if step >= min(ahead, steps - 1):
                found.append(tuple(counts))
                counts[backward[step - min(ahead, steps - 1)]] -= 1
        return found

    def _loss(self) -> float:
        """Logits, the block of them in fp32, and the gradients that follow; the final norm."""
        model, formulas, tp = self._run.model, self._formulas, self._layout.tp
        numbers = formulas.tokens * model.padded_vocab_size / tp
        if self._run.recompute.logits:
            numbers = min(numbers, _LOSS_BLOCK[self._micro.on_cpu])
        logits = numbers * formulas.bytes
        block = 0.0
        if formulas.bytes != FULL_PRECISION and not self._micro.by_kernels:  # whose registers have it
            block = min(numbers, max(_LOSS_BLOCK[self._micro.on_cpu], model.padded_vocab_size / tp)) * FULL_PRECISION
        # The hidden states' gradient, and under sequence parallelism they themselves, are there for all tokens.
        wide = formulas.gathered + (formulas.gathered if self._run.parallel.sequence_parallel else 0.0)
        if self._run.recompute.logits:
            # Both sums over the parts live from the first part on: of the hidden states' gradient, in fp32, and the
            # table's gradient.
            summed = formulas.gathered / formulas.bytes * FULL_PRECISION
            return logits + block + wide - formulas.gathered + summed + self._table()
        return logits + max(block, wide + self._table())

    def _table(self) -> float:
        """The gradient of the embedding or the output layer, before it is added up in fp32."""
        model = self._run.model
        return model.padded_vocab_size * model.hidden_size / self._layout.tp * self._formulas.bytes

    def _buffers(self) -> float:
        """Gathered tokens of sequence parallelism, a message in each direction of the pipeline, tokens and labels."""
        gathered = self._formulas.gathered if self._run.parallel.sequence_parallel else 0.0
        messages = 2 * self._formulas.residual if self._layout.pp > 1 else 0.0
        rows = self._micro.rows * self._micro.length
        return gathered + messages + rows * (28 * self._micro_batches + 8 * 4)
