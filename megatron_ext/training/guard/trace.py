"""Where a step first met a number that is not finite: on which rank, in which module or gradient, of which samples.

Nothing is watched while all is well. A step that went wrong leaves two traces, read before anything is updated:

- its gradients, as the backward pass left them. The distributed optimizer reduces to each rank only what that rank
  updates, so that elsewhere a buffer still holds the rank's own gradient: the rank that brought the number in.
- the same step once more, from the same random state, with every module and every gradient looked at as it comes. It
  tells the first place in the order of computation. Where all is finite then, it was neither the data nor the weights.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_ext.mcore.build import Trainable
from megatron_ext.mcore.gradients import nonfinite, place_of, raw_gradients
from megatron_ext.mcore.state import shards_of
from megatron_ext.runtime.process_groups import Groups
from megatron_ext.training.verdict import FirstNonFinite

_BEHIND = 10**6
"""The place in the order of layers of what comes after them."""
_UNSOUND = 1e6
"""No weight of a sound model is so large: a bit flipped, or the run has diverged."""


@dataclass(frozen=True)
class _Seen:
    """A place where a rank met such a number first."""

    where: str
    """Name of the weight or the module."""
    phase: str
    """weights, forward or backward."""
    micro_batch: int
    """Of this rank."""
    order: int
    """In the order of time on this rank."""

    @property
    def key(self) -> tuple[int, int, int, int]:
        """Sorts what different ranks have seen by what follows from what."""
        layer, group = place_of(self.where + ".")
        at = layer + 1 if layer is not None else 0 if group == "embedding" else _BEHIND
        phase = ("weights", "forward", "backward").index(self.phase)
        return (self.micro_batch if phase else -1), phase, (-at if self.phase == "backward" else at), self.order


@dataclass(frozen=True)
class _Trace:
    """What one rank knows."""

    rank: int
    place: str
    """In the grid of ranks."""
    data: int
    """Data-parallel rank."""
    again: _Seen | None
    """What computing the step once more has met first."""
    own: str | None
    """The weight, first in the order of the backward pass, whose gradient it brought in, and nobody else."""
    reduced: str | None
    """The same, of its share of the reduced gradient."""
    largest: tuple[float, str]
    """The largest finite number of its gradients, and of which weight."""
    heaviest: tuple[float, str]
    """The largest finite number of its weights, and of which."""


def find_first(trainable: Trainable, groups: Groups, compute_again: Callable[[], object]) -> FirstNonFinite:
    """Find out where the step just computed first met a number that is not finite; every rank must call this.

    Args:
        compute_again: computes the step once more.
    """
    own, reduced, largest = _of_gradients(trainable)
    with _Watch(trainable.chunks) as watch:
        compute_again()
    grid = {"TP": groups.tp, "CP": groups.cp, "DP": groups.dp, "PP": groups.pp}
    # Context parallelism is the rarer one: it is named where it is there.
    place = ", ".join(f"{name} {one.rank()}" for name, one in grid.items() if name != "CP" or one.size() > 1)
    ranks = groups.world.rank(), place, groups.dp.rank()
    traces: list[Any] = [None] * groups.world.size()
    dist.all_gather_object(
        traces, _Trace(*ranks, watch.first, own, reduced, largest, _heaviest(trainable.chunks)), group=groups.world
    )
    return _conclusion(traces, groups.dp.size())


def _of_gradients(trainable: Trainable) -> tuple[str | None, str | None, tuple[float, str]]:
    """What the gradients of this rank say: see `_Trace`."""
    own = reduced = None
    largest = (0.0, "")
    for gradient in raw_gradients(trainable.chunks, trainable.optimizer):  # the last one is the first backward
        data, start, end = gradient.data, gradient.start, gradient.end
        if nonfinite(data[start:end]):
            reduced = gradient.key
        if nonfinite(data[:start]) or nonfinite(data[end:]):
            own = gradient.key
        largest = max(largest, (_largest(data), gradient.key))
    return own, reduced, largest


def _heaviest(chunks: Sequence[torch.nn.Module]) -> tuple[float, str]:
    """The largest finite number of the weights of this rank, and of which."""
    weights = ((pieces[0].key, param) for chunk in chunks for param, pieces in shards_of(chunk).items())
    return max(((_largest(param), key) for key, param in weights), default=(0.0, ""))


def _largest(tensor: Tensor) -> float:
    """The largest finite magnitude in it."""
    return float(torch.nan_to_num(tensor.detach().float(), 0.0, 0.0, 0.0).abs().max()) if tensor.numel() else 0.0


class _Watch:
    """While inside, looks at every module's output and every weight's gradient, until one is not finite."""

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        self._chunks = chunks
        self._handles: list[Any] = []
        # Products that add gradients to their sums would hand none on to look at. (megatron-core's modules share a
        # configuration, or have a copy.)
        self._adding: list[Any] = [
            module.config
            for chunk in chunks
            for module in chunk.modules()
            if getattr(getattr(module, "config", None), "adds_weight_gradients", False)
        ]
        self._order = 0
        self.first: _Seen | None = None

    def __enter__(self) -> "_Watch":
        self._add_gradients(False)
        for chunk in self._chunks:
            begun, names = [0], _names(chunk)
            self._handles.append(chunk.register_forward_pre_hook(partial(self._begins, begun)))
            for name, module in chunk.named_modules():
                self._handles.append(module.register_forward_hook(partial(self._forward, begun, names(name))))
            for param, pieces in shards_of(chunk).items():
                self._note(pieces[0].key, "weights", 0, param)
                if param.requires_grad:
                    hook = partial(self._backward, [0], pieces[0].key)
                    self._handles.append(param.register_hook(hook))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._add_gradients(True)

    def _add_gradients(self, adds: bool) -> None:
        for config in self._adding:
            config.adds_weight_gradients = adds

    def _begins(self, begun: list[int], module: torch.nn.Module, inputs: Any) -> None:
        begun[0] += 1

    def _forward(self, begun: list[int], name: str, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        for tensor in _tensors(output):
            self._note(name, "forward", begun[0] - 1, tensor)

    def _backward(self, done: list[int], key: str, gradient: Tensor) -> None:
        self._note(key, "backward", done[0], gradient)
        done[0] += 1

    def _note(self, where: str, phase: str, micro_batch: int, tensor: Any) -> None:
        self._order += 1
        if self.first is None and nonfinite(tensor):
            self.first = _Seen(where, phase, micro_batch, self._order)


def _names(chunk: torch.nn.Module) -> Callable[[str], str]:
    """Names a module of a chunk as checkpoints name its weights: layers are counted over the whole model."""
    layers = {
        f"{name}.": f"decoder.layers.{int(module.layer_number) - 1}."
        for name, module in chunk.named_modules()
        if name.startswith("decoder.layers.") and name.count(".") == 2
    }

    def named(name: str) -> str:
        prefix = next((local for local in layers if f"{name}.".startswith(local)), None)
        return (layers[prefix] + f"{name}."[len(prefix) :]).rstrip(".") if prefix else name or "loss"

    return named


def _tensors(output: Any) -> Iterator[Any]:
    if isinstance(output, list | tuple):
        for part in output:
            yield from _tensors(part)
    elif isinstance(output, Mapping):
        yield from _tensors(list(output.values()))
    else:
        yield output


def _conclusion(traces: Sequence[_Trace], data_parallel: int) -> FirstNonFinite:
    """What all ranks together know."""
    if seeing := [trace for trace in traces if trace.again is not None]:
        first = min(seeing, key=lambda trace: (trace.again.key, trace.rank) if trace.again else ((), 0))
        assert first.again is not None
        seen, ranks = first.again, [trace.rank for trace in seeing]
        # Micro-batch m of data-parallel rank r is number m * D + r of the global batch.
        number = None if seen.phase == "weights" else seen.micro_batch * data_parallel + first.data
        what = {"weights": "the weight", "forward": "forward, in", "backward": "backward, the gradient of"}[seen.phase]
        return _said(first, f"{what} {seen.where}", seen.where, ranks, number, phase=seen.phase, reproducible=True)
    note = "; computed once more the step was finite, so it was neither the data nor the weights: look at that machine"
    if owning := [trace for trace in traces if trace.own is not None]:
        ranks = [trace.rank for trace in owning]
        return _of_gradient(owning[0], owning[0].own, ranks, note)
    if reducing := [trace for trace in traces if trace.reduced is not None]:
        ranks = [trace.rank for trace in reducing]
        return _of_gradient(reducing[0], reducing[0].reduced, ranks, note)
    text = "every number of the gradient is finite, but not its norm: "
    heavy, steep = max(traces, key=lambda one: one.heaviest), max(traces, key=lambda one: one.largest)
    if heavy.heaviest[0] > _UNSOUND:
        (amount, where), trace, of = heavy.heaviest, heavy, "weight"
    else:
        (amount, where), trace, of = steep.largest, steep, "gradient"
    text += f"the largest {of}, {amount:.3g}, is of {where}"
    return _said(trace, text, where, [trace.rank], None, phase="norm", reproducible=False)


def _of_gradient(trace: _Trace, key: str | None, ranks: list[int], note: str) -> FirstNonFinite:
    assert key is not None
    return _said(trace, f"the gradient of {key}{note}", key, ranks, None, phase="backward", reproducible=False)


def _said(
    trace: _Trace, what: str, where: str, ranks: list[int], micro_batch: int | None, **details: Any
) -> FirstNonFinite:
    layer, group = place_of(where + ".")
    place = f"layer {layer}, {group}" if layer is not None else group
    of = f", micro-batch {micro_batch}" if micro_batch is not None else ""
    rank = f"first on rank {trace.rank} ({trace.place})"
    if len(ranks) > 1 and not details["reproducible"]:  # what was summed up does not tell whose it was
        rank = f"brought in by one or more of the ranks {', '.join(map(str, ranks))}"
    found = {"rank": trace.rank, "ranks": ranks, "where": where, "layer": layer, "group": group}
    return FirstNonFinite(
        f"{rank}{of}: {what} ({place})",
        {**found, "micro_batch": micro_batch, **details},
    )
