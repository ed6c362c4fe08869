"""Does a Hugging Face model generate with its cache, from padded prompts, what it computes without both?"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_NEW_TOKENS = 8
_LONGEST_PROMPT = 24


@dataclass(frozen=True)
class GenerationComparison:
    """Tokens generated greedily, with a cache and from prompts padded on the left, against logits of whole rows."""

    tokens: int
    same: int
    """Tokens that are the likeliest ones, computed for their row alone, unpadded and without a cache."""
    shortfall: float
    """By how much a generated token's logit is below the largest one, at most; 0 where all tokens are the same."""
    scale: float
    """Largest absolute logit."""

    @property
    def relative(self) -> float:
        """The shortfall over the logits' scale: rounding may decide between two tokens that are equally likely."""
        if math.isnan(self.shortfall) or math.isinf(self.shortfall):
            return math.inf
        return self.shortfall / self.scale if self.shortfall else 0.0


@torch.no_grad()
def compare_generation(network: Any, rows: Tensor, longest: int) -> GenerationComparison | None:
    """Generate from the token ids `rows` [B, S] with transformers' `generate`, and compute the same without a cache.

    The first row's prompt is whole, each next one a third shorter and padded on the left. What the model's own
    generation_config.json says of sampling and stopping is left aside (`network` is changed so).

    Args:
        longest: tokens that prompt and continuation may have together, such as the positions that a model has.

    Returns:
        The comparison, or None where `longest` leaves no room for two new tokens.
    """
    from transformers import GenerationConfig  # slow to import

    new = min(_NEW_TOKENS, longest // 2)
    if new < 2:
        return None
    rows = rows[:, : min(_LONGEST_PROMPT, longest - new)]
    lengths = [max(1, rows.shape[1] - n * math.ceil(rows.shape[1] / 3)) for n in range(len(rows))]
    prompts, mask = torch.zeros_like(rows), torch.zeros_like(rows)
    for row, length in enumerate(lengths):
        prompts[row, -length:], mask[row, -length:] = rows[row, :length], 1
    network.generation_config = GenerationConfig(pad_token_id=0)
    made = network.generate(prompts, attention_mask=mask, do_sample=False, max_new_tokens=new, use_cache=True)
    whole = [torch.cat((rows[row, :length], made[row, rows.shape[1] :])) for row, length in enumerate(lengths)]
    return _against_whole_rows(network, whole, lengths)


def _against_whole_rows(network: Any, whole: Sequence[Tensor], lengths: Sequence[int]) -> GenerationComparison:
    count = same = 0
    shortfall = scale = 0.0
    for tokens, length in zip(whole, lengths, strict=True):
        logits = network(tokens.unsqueeze(0), use_cache=False).logits[0, length - 1 : -1].float()
        generated = tokens[length:]
        short = logits.amax(-1) - logits.gather(1, generated.unsqueeze(-1)).squeeze(-1)
        count, same = count + len(generated), same + int((short == 0).sum())
        shortfall = float(torch.stack((short.amax(), torch.tensor(shortfall))).amax())  # max() would lose a NaN
        scale = max(scale, float(logits.abs().amax()))
    return GenerationComparison(count, same, shortfall, scale)
