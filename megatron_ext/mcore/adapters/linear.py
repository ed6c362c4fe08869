"""Linear layers with adapters: megatron-core's parallel ones, the replicated one of latent attention, the embedding.

An adapter's output is in the state of the base's output that it is added to (a shard, a part of the sequence), and only
the narrow tensor between its halves is communicated. A replicated half that sees a part of the sequence says so, and
its gradient is summed over the TP group; one that sees it all has the whole gradient already.
"""

#   S sequence of this rank (of the whole TP group where gathered), B micro-batch, R ranks of all projections together

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor

from megatron_ext.mcore.adapters.low_rank import Halves, ModuleAdapters, mark
from megatron_ext.mcore.split_parameters import describe_split


class _WithAdapters(torch.nn.Module):
    """Comes before a linear class in the order of bases; `adapters` is a class attribute of what plan.py makes."""

    adapters: ModuleAdapters
    split_of_A: int | None = None
    split_of_B: int | None = None
    enabled = True
    """False: the base alone computes."""
    tp_group: Any

    def _build(self, inputs: int, outputs: dict[str, int], dtype: torch.dtype, *, sees_part: bool) -> None:
        """Make the halves, for so many inputs and outputs of this rank."""
        self.lora = torch.nn.ModuleDict()
        for low_rank in self.adapters.of():
            halves = Halves(low_rank, inputs, outputs[low_rank.projection], dtype)
            mark(halves.A, self.split_of_A, sees_part=sees_part)
            mark(halves.B, self.split_of_B, sees_part=sees_part)
            self.lora[low_rank.projection] = halves

    def _halves(self) -> dict[str, Halves]:
        return {name: halves for name, halves in self.lora.items() if isinstance(halves, Halves)}

    def _down(self, x: Tensor, *, own_numbers: bool = False) -> Tensor:
        """The narrow tensors of all projections side by side, [S, B, R]."""
        pairs = [(halves, halves()[0]) for halves in self._halves().values()]
        if not any(halves.low_rank.dropout for halves, _ in pairs):
            return F.linear(x, torch.cat([A for _, A in pairs]) if len(pairs) > 1 else pairs[0][1])
        return torch.cat([F.linear(halves.dropped(x, own_numbers=own_numbers), A) for halves, A in pairs], dim=-1)

    def _up(self, narrow: Tensor) -> Tensor:
        """The adapters' output, from what `_down` returns."""
        pairs = self._halves()
        parts = narrow.split([halves.low_rank.rank for halves in pairs.values()], dim=-1)
        made = {
            name: F.linear(part * halves.low_rank.scale, halves()[1])
            for (name, halves), part in zip(pairs.items(), parts, strict=True)
        }
        return self.adapters.assemble(made, self.tp_group.size() if self.split_of_B == 0 else 1)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Describe the base's parameters as the base does, and the halves by their own splits."""
        described: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        own = f"{prefix}lora."
        kept = {name: entry for name, entry in described.items() if not name.startswith(own)}
        splits = (("A", self.split_of_A), ("B", self.split_of_B))
        dims = {half: dim for half, dim in splits if dim is not None}
        for name, halves in self._halves().items():
            kept |= describe_split(halves, dims, self.tp_group, f"{own}{name}.", sharded_offsets, metadata)
        return kept


class ColumnAdapters(_WithAdapters):
    """Of a layer split by output features: A is whole, B split as the weight."""

    split_of_B = 0
    sequence_parallel: bool

    def __init__(self, input_size: int, output_size: int, *, config: Any, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        outputs = {name: rows // self.tp_group.size() for name, rows in self.adapters.outputs}
        # A sees this rank's tokens before they are gathered, B the gathered ones.
        self._build(input_size, outputs, config.params_dtype, sees_part=self.sequence_parallel)

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """What the base returns, with the adapters' output added."""
        output, bias = super().forward(input_, *args, **kwargs)
        if not self.enabled:
            return output, bias
        narrow = self._down(input_)
        if self.sequence_parallel:
            narrow = gather_from_sequence_parallel_region(narrow, group=self.tp_group)
        elif self.tp_group.size() > 1:
            # Each rank has the gradient by way of its own outputs.
            narrow = copy_to_tensor_model_parallel_region(narrow, group=self.tp_group)
        return output + self._up(narrow), bias


class RowAdapters(_WithAdapters):
    """Of a layer split by input features: A is split as the weight, B whole."""

    split_of_A = 1
    sequence_parallel: bool

    def __init__(self, input_size: int, output_size: int, *, config: Any, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        # B sees this rank's tokens, the sums of the others' having been sent to them.
        inputs = input_size // self.tp_group.size()
        self._build(inputs, dict(self.adapters.outputs), config.params_dtype, sees_part=self.sequence_parallel)

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the base returns, with the adapters' output added."""
        output, bias = super().forward(input_)
        if not self.enabled:
            return output, bias
        # Under sequence parallelism megatron-core's block already draws what is a rank's own.
        split = self.tp_group.size() > 1
        narrow = self._down(input_, own_numbers=split and not self.sequence_parallel)
        if self.sequence_parallel:
            narrow = reduce_scatter_to_sequence_parallel_region(narrow, group=self.tp_group)
        elif split:
            narrow = reduce_from_tensor_model_parallel_region(narrow, group=self.tp_group)
        return output + self._up(narrow), bias


class ReplicatedAdapters(_WithAdapters):
    """Of latent attention's down-projections, whole on every TP rank: so are both halves."""

    def __init__(self, config: Any, outputs: int, shared: int, tp_group: Any) -> None:
        super().__init__(config, outputs, shared, tp_group)
        self._build(
            config.hidden_size, dict(self.adapters.outputs), config.params_dtype, sees_part=config.sequence_parallel
        )

    def project(self, hidden_SBH: Tensor) -> Tensor:
        """What the base computes, with the adapters' output added, before gradients of shared outputs are summed."""
        output: Tensor = super().project(hidden_SBH)  # type: ignore[misc]
        return output + self._up(self._down(hidden_SBH)) if self.enabled else output


class EmbeddingAdapters(_WithAdapters):
    """Of the embedding, whose rows are split: so are A's columns, which tokens look up as they do the rows."""

    split_of_A = 1
    reduce_scatter_embeddings: bool
    vocab_start_index: int
    vocab_end_index: int

    def __init__(self, *, config: Any, **kwargs: Any) -> None:
        super().__init__(config=config, **kwargs)
        self._build(
            self.vocab_end_index - self.vocab_start_index,
            dict(self.adapters.outputs),
            config.params_dtype,
            sees_part=self.reduce_scatter_embeddings,
        )

    def forward(self, input_: Tensor) -> Tensor:
        """What the base returns, with the adapter's output added."""
        output: Tensor = super().forward(input_)
        if not self.enabled:
            return output
        (halves,) = self._halves().values()
        here = (input_ >= self.vocab_start_index) & (input_ < self.vocab_end_index)
        local = (input_ - self.vocab_start_index).where(here, 0)
        narrow = F.embedding(local, halves()[0].t()) * here.unsqueeze(-1)
        if self.reduce_scatter_embeddings:
            narrow = reduce_scatter_to_sequence_parallel_region(
                narrow.transpose(0, 1).contiguous(), group=self.tp_group
            )
        elif self.tp_group.size() > 1:
            narrow = reduce_from_tensor_model_parallel_region(narrow, group=self.tp_group)
        return output + self._up(narrow)
