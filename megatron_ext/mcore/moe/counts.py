"""What a router counts between two reports."""

#   E experts, T tokens

import torch
from torch import Tensor

MEANS = ("entropy", "top1", "ratio")
LOSSES = ("aux_loss", "seq_aux_loss", "global_aux_loss", "z_loss")
COLUMNS = ("dropped", "tokens", *MEANS, *LOSSES)
"""What follows the E loads in a row of sums."""


@torch.no_grad()
def shape_sums(probabilities_TE: Tensor) -> Tensor:
    """Sums over the tokens of what `MEANS` names of their distributions."""
    best_T2 = probabilities_TE.topk(2, dim=-1).values
    entropy = torch.special.entr(probabilities_TE).sum()
    ratio = (best_T2[:, 0] / best_T2[:, 1].clamp(min=1e-9)).sum()
    return torch.stack((entropy, best_T2[:, 0].sum(), ratio))


class RouterCounts:
    """Sums over the tokens that one router has seen since the last report; nothing is read from the device here."""

    def __init__(self, experts: int) -> None:
        self.experts = experts
        self.sums: Tensor | None = None
        self._before: Tensor | None = None
        """What `sums` was when the step began that is on its way."""

    def begin_step(self) -> None:
        """What is counted from now on belongs to a step that may be refused."""
        self._before = self.sums

    def discard_step(self) -> None:
        """Forget what the refused step counted."""
        self.sums = self._before

    def add(self, load_E: Tensor, dropped: Tensor, tokens: int, shape: Tensor) -> None:
        """Count a micro-batch of so many tokens: assignments, dropped ones, and what `shape_sums` says of the gate."""
        row = torch.stack((dropped, load_E.new_full((), tokens)))
        self._add(torch.cat((load_E.float(), row, shape, shape.new_zeros(len(LOSSES)))))

    def add_loss(self, kind: str, value: Tensor) -> None:
        """Add this rank's part of a loss, without its coefficient."""
        row = torch.zeros(self.experts + len(COLUMNS), device=value.device)
        row[self.experts + COLUMNS.index(kind)] = value.detach()
        self._add(row)

    def _add(self, row: Tensor) -> None:
        self.sums = row if self.sums is None else self.sums + row
