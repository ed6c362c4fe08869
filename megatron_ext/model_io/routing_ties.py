"""Rows of a MoE model's logits in which rounding decides which experts are taken, told apart from real differences.

Where two experts score alike to fp32 rounding, two right computations may take different ones, and their logits then
differ from that position of the row on by far more than rounding. Such a row is one that the model computes itself,
too, when its embeddings are changed by no more than their rounding. A wrong weight, a wrong formula or a wrong position
is not: no change that small brings it about.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_ROUNDING = 3e-7
"""Relative change of the embeddings: a few units in the last place of fp32 (6e-8), as sums in another order have."""
_TRIES = 32
"""Changes tried for a row. A tie falls either way in about half of them; two in one row together in a quarter."""
_MOST_ROWS = 4
"""One row of so many may have a tie, or one in all: with more, something else is different."""


def settle_ties(
    network: Any, batches: Sequence[Tensor], expected: Sequence[Tensor], computed: Sequence[Tensor], tolerance: float
) -> tuple[list[Tensor], int]:
    """The logits that `network` computes, with each row taken as `expected` has it where rounding decides.

    Args:
        network: transformers' MoE model, in fp32.
        batches: token ids [B, S].
        expected: logits [B, S, vocab] of the other model.
        computed: those of `network` for `batches`.
        tolerance: largest difference that counts as equal, relative to the largest logit of `expected`.

    Returns:
        (logits [B, S, vocab] like `computed`, how many rows were taken from a changed computation).
    """
    bound = tolerance * max(float(logits.abs().max()) for logits in expected)
    apart = [
        (batch, row)
        for batch, (x, y) in enumerate(zip(expected, computed, strict=True))
        for row in range(len(x))
        if not float((x[row] - y[row]).abs().max()) <= bound
    ]
    if len(apart) > max(1, sum(map(len, batches)) // _MOST_ROWS):
        return list(computed), 0
    settled, rows = [logits.clone() for logits in computed], 0
    for batch, row in apart:
        for seed in range(_TRIES):
            logits = _changed(network, batches[batch][row : row + 1], seed)[0]
            if float((expected[batch][row] - logits).abs().max()) <= bound:
                settled[batch][row] = logits
                rows += 1
                break
    return settled, rows


@torch.no_grad()
def _changed(network: Any, tokens: Tensor, seed: int) -> Tensor:
    """Logits of `tokens` with the embeddings changed by their rounding."""
    generator = torch.Generator().manual_seed(seed)

    def change(module: Any, inputs: Any, output: Tensor) -> Tensor:
        return output * (1 + _ROUNDING * torch.randn(output.shape, generator=generator))

    handle = network.get_input_embeddings().register_forward_hook(change)
    try:
        logits: Tensor = network(tokens, use_cache=False).logits.float()
    finally:
        handle.remove()
    return logits
