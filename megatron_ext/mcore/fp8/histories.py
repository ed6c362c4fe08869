"""The amax histories of delayed fp8 scaling: moved by each step that is taken, saved with the training state."""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_ext.checkpoint.shards import TensorShard
from megatron_ext.mcore.fp8.scaling import Scaling


class AmaxHistories:
    """All histories of this rank's layers, as a `StepParticipant` (mcore/step_state.py).

    Args:
        scalings: those with delayed scaling, by the name of their layer and module; every rank that shares a layer has
            the same histories.
        is_writer: whether this rank saves them.
    """

    def __init__(self, scalings: Mapping[str, Scaling], *, is_writer: bool) -> None:
        self._scalings, self._is_writer = dict(scalings), is_writer

    def begin(self) -> None:
        """Nothing to do: both ways to close a step leave no maxima behind."""

    @torch.no_grad()
    def commit(self, group: dist.ProcessGroup | None) -> None:
        """Take the maxima of the step that was made, over `group` if there is one, into the histories."""
        latest = torch.stack([scaling.latest for scaling in self._scalings.values()])
        if group is not None:
            dist.all_reduce(latest, op=dist.ReduceOp.MAX, group=group)
        for scaling, maxima in zip(self._scalings.values(), latest, strict=True):
            scaling.advance(maxima)

    @torch.no_grad()
    def discard(self) -> None:
        """Forget the maxima of a step that was refused: they enter no history."""
        for scaling in self._scalings.values():
            scaling.latest.zero_()

    def state(self) -> list[TensorShard]:
        """The histories, `optimizer.state.amax_history.<layer and module>`; with another recipe they begin anew."""
        return [
            TensorShard(
                f"optimizer.state.amax_history.{name}",
                tuple(scaling.amax_history.shape),
                (0, 0),
                scaling.amax_history,
                self._is_writer,
                optional=True,
            )
            for name, scaling in self._scalings.items()
        ]


def delayed_scalings(chunks: Sequence[torch.nn.Module]) -> dict[str, Scaling]:
    """Every scaling of `chunks` that keeps a history, by `decoder.layers.<layer>.<module>`, in the order of layers."""
    layers = [layer for chunk in chunks for layer in chunk.modules() if isinstance(layer, TransformerLayer)]
    return {
        f"decoder.layers.{layer.layer_number - 1}.{name}": module
        for layer in layers
        for name, module in layer.named_modules()
        if isinstance(module, Scaling) and module.is_delayed
    }
