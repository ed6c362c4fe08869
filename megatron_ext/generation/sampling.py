"""How the next token is chosen, by transformers' own processors of logits, and where a continuation ends."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_ext.errors import CheckpointError

Processor = Callable[[Tensor, Tensor], Tensor]
"""Takes token ids [B, S] and the scores of the next one [B, vocab], and returns scores."""

_COLDEST, _HOTTEST = 1e-6, 1e30
"""Temperatures that fp32 logits can be divided by: below, the likeliest token is as good as certain; above, all tokens
are as likely as at infinity."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; in the order of transformers' `generate`: penalty, temperature, top-k, top-p."""

    temperature: float = 0.0
    """0 takes the likeliest token each time."""
    top_k: int = 0
    """Among the so many likeliest tokens; 0: among all."""
    top_p: float = 1.0
    """Among the likeliest tokens that together have this probability."""
    repetition_penalty: float = 1.0
    """Tokens that prompt or continuation have are less likely, above 1 (CTRL, arXiv 1909.05858)."""
    seed: int = 0
    """Each prompt draws for itself, by this and its number: the same in any batch, and with any other prompts."""

    def processors(self, numbers: Sequence[int], paddings: Sequence[int]) -> list[Processor]:
        """Steps after which the likeliest token is the chosen one.

        Args:
            numbers: of the prompts in the rows of a batch; each is drawn for by its own.
            paddings: tokens of padding at the beginning of each row, which are no repetitions.
        """
        from transformers import (  # slow to import
            RepetitionPenaltyLogitsProcessor,
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        steps: list[Processor] = []
        if self.repetition_penalty != 1.0:
            steps.append(_unpadded(RepetitionPenaltyLogitsProcessor(self.repetition_penalty), paddings))
        if self.temperature < _COLDEST:
            return steps
        steps.append(TemperatureLogitsWarper(min(float(self.temperature), _HOTTEST)))
        if self.top_k:
            steps.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            steps.append(TopPLogitsWarper(float(self.top_p)))
        return [*steps, _drawn([torch.Generator().manual_seed(_mixed(self.seed, number)) for number in numbers])]


def _mixed(seed: int, number: int) -> int:
    """A seed of its own for prompt `number`, so that seed 1 does not draw for it what seed 0 does for the next one."""
    return (seed * 0x9E3779B97F4A7C15 + number * 0xD1342543DE82EF95) % 2**63


def _unpadded(process: Any, paddings: Sequence[int]) -> Processor:
    """`process` on each row without its padding."""

    def step(input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = [process(input_ids[r : r + 1, p:], scores[r : r + 1]) for r, p in enumerate(paddings)]
        return torch.cat(rows)

    return step


def _drawn(generators: Sequence[torch.Generator]) -> Processor:
    """Scores of which the largest is at a token drawn by `scores`: each probability over an exponential number."""

    def step(input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = [torch.empty(scores.shape[-1]).exponential_(generator=one) for one in generators]
        return scores.float() - torch.stack(noise).clamp_min_(1e-30).log_().to(scores.device)

    return step


def numbers_only(name: str) -> Processor:
    """A step that ends generation by the model `name` with a CheckpointError where logits are NaN or infinite."""

    def check(input_ids: Tensor, scores: Tensor) -> Tensor:
        # Minus infinity is how a token is excluded.
        if bool((scores.isnan() | scores.isposinf()).any()):
            raise CheckpointError(
                f"{name}: the logits after {input_ids.shape[1]:,} tokens are NaN or infinite, though its weights are "
                "numbers; they are too large to compute with"
            )
        return scores

    return check


class StopTexts:
    """A criterion of transformers' `generate`: a row is over when its continuation has one of `texts`.

    Args:
        decode: the text of token ids.
        start: where continuations begin.
    """

    def __init__(self, texts: Sequence[str], decode: Callable[[Tensor], str], start: int) -> None:
        self._texts, self._decode, self._start = texts, decode, start

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Whether each row of the token ids [B, S] is over, [B]."""
        said = [self._decode(row[self._start :]) for row in input_ids]
        return torch.tensor([any(text in one for text in self._texts) for one in said], device=input_ids.device)


class Streamer:
    """Takes the tokens of one continuation as `generate` makes them, and hands on text that later ones cannot change.

    Args:
        decode: the text of token ids.
        write: takes the next piece.
        stops: texts that end it and are not part of it.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], write: Callable[[str], None], stops: Sequence[str] = ()
    ) -> None:
        self._decode, self._write, self._stops = decode, write, stops
        self._ids: list[int] | None = None
        """Of the continuation; None before the prompt, which comes first."""
        self._written = ""

    def put(self, value: Tensor) -> None:
        """Take the next tokens."""
        if self._ids is None:
            self._ids = []
            return
        self._ids.extend(value.flatten().tolist())
        text = until_stop(self._decode(self._ids), self._stops)
        # What may be a part of a character, or of a text that ends it, waits.
        held = max((n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        if not text.endswith("\ufffd"):
            self._advance(text[: len(text) - held])

    def end(self) -> None:
        """The continuation is over."""
        if self._ids is not None:
            self._advance(until_stop(self._decode(self._ids), self._stops))

    def _advance(self, text: str) -> None:
        if text.startswith(self._written):
            self._write(text[len(self._written) :])
            self._written = text


def until_stop(text: str, stops: Sequence[str]) -> str:
    """`text` up to the first of `stops` in it."""
    return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]
