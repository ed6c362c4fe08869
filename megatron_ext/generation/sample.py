"""Continues prompts with a Hugging Face model or a Megatron checkpoint."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_ext.errors import CheckpointError, DataError
from megatron_ext.foreign import reading
from megatron_ext.generation.prompts import Encoder, Prompt
from megatron_ext.generation.sampling import Sampling, StopTexts, Streamer, numbers_only, until_stop
from megatron_ext.generation.text_model import TextModel, text_model
from megatron_ext.model_io.logits import A_MODEL, SETTLE

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Continuation:
    """What a model made of a prompt."""

    prompt: Prompt
    text: str
    """Without special tokens, and up to the text that stopped it."""
    ids: Sequence[int]
    """The tokens made for it, with the one that ended it."""
    ended: bool
    """By a token or text that ends it, and not by its length."""

    @property
    def tokens(self) -> int:
        """How many were made."""
        return len(self.ids)


@dataclass(frozen=True)
class Continuing:
    """How prompts are continued."""

    sampling: Sampling = Sampling()
    max_new_tokens: int = 64
    batch_size: int = 8
    """Prompts that are continued at once."""
    stop: Sequence[str] = ()
    """Texts or tokens that end a continuation, besides those of the model's generation_config.json."""
    chat_template: str | None = None
    """Of conversations; default: the tokenizer's."""


def generate(
    checkpoint: str | Path,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    trust_remote_code: bool = False,
) -> list[str]:
    """Return the continuation of each prompt; `temperature` 0 takes the likeliest token each time.

    A continuation ends at the last learned position of a model that has such, which is said.

    Raises:
        DataError: there is no tokenizer for the prompts, or one of them is empty or longer than learned positions.
        CheckpointError: the weights or what they compute are no numbers.
    """
    how = Continuing(Sampling(temperature, top_p=top_p, seed=seed), max_new_tokens)
    with text_model(checkpoint, trust_remote_code=trust_remote_code) as model:
        return [made.text for made in continued(model, [Prompt(prompt) for prompt in prompts], how)]


def continued(
    model: TextModel,
    prompts: Sequence[Prompt],
    how: Continuing,
    *,
    write: Callable[[str], None] | None = None,
    first: int = 0,
) -> Iterator[Continuation]:
    """Yield the continuation of each prompt in order.

    Args:
        write: given each piece of text as it is made; one prompt is continued at a time then.
        first: the number of the first prompt, by which it is drawn for.

    Raises:
        DataError, CheckpointError: as `generate`.
    """
    encoder = Encoder(model, how.chat_template)
    encoded = [encoder.encode(prompt) for prompt in prompts]
    # Padding would take of the positions that there are.
    size = 1 if write is not None or model.positions is not None else how.batch_size
    for at in range(0, len(prompts), size):
        rows = prompts[at : at + size]
        numbers = range(first + at, first + at + len(rows))
        yield from _batch(model, rows, encoded[at : at + size], numbers, how, write)


def _batch(
    model: TextModel,
    prompts: Sequence[Prompt],
    rows: Sequence[Sequence[int]],
    numbers: Sequence[int],
    how: Continuing,
    write: Callable[[str], None] | None,
) -> Iterator[Continuation]:
    length = max(map(len, rows))
    room = how.max_new_tokens if model.positions is None else min(how.max_new_tokens, model.positions - length)
    settings, ends, texts = _settings(model, how, room)
    paddings = [length - len(row) for row in rows]
    ids = torch.tensor([[settings.pad_token_id] * p + list(row) for p, row in zip(paddings, rows, strict=True)])
    mask = torch.tensor([[0] * p + [1] * len(row) for p, row in zip(paddings, rows, strict=True)])

    def decode(tokens: Any) -> str:
        return str(model.tokenizer.decode(tokens, skip_special_tokens=True))

    with reading(model.name, CheckpointError, kind=A_MODEL, advice=SETTLE):
        made = model.network.generate(
            ids.to(model.network.device),
            attention_mask=mask.to(model.network.device),
            generation_config=settings,
            logits_processor=[numbers_only(model.name), *how.sampling.processors(numbers, paddings)],
            stopping_criteria=[StopTexts(texts, decode, length)] if texts else [],
            streamer=None if write is None else Streamer(decode, write, texts),
        )[:, length:].cpu()
    for prompt, new in zip(prompts, made, strict=True):
        yield _continuation(model, prompt, new, ends, texts, decode, room, how)


def _continuation(
    model: TextModel,
    prompt: Prompt,
    new: torch.Tensor,
    ends: Sequence[int],
    texts: Sequence[str],
    decode: Callable[[Any], str],
    room: int,
    how: Continuing,
) -> Continuation:
    """What the new tokens of a row say; behind the one that ends it there is padding."""
    at = next((n for n, token in enumerate(new.tolist()) if token in ends), None)
    new = new if at is None else new[: at + 1]
    whole = decode(new)
    text = until_stop(whole, texts)
    if text != whole:  # rows of a batch go on with padding after their stop
        new = new[: next(n for n in range(1, len(new) + 1) if any(stop in decode(new[:n]) for stop in texts))]
    ended = at is not None or text != whole
    if not ended and room < how.max_new_tokens:
        log.warning(
            "the continuation of %r ends after %d tokens: %s has learned %d positions (max_position_embeddings)",
            prompt.text if len(prompt.text) <= 40 else f"{prompt.text[:37]}...",
            room,
            model.name,
            model.positions,
        )
    return Continuation(prompt, text, new.tolist(), ended)


def _settings(model: TextModel, how: Continuing, room: int) -> tuple[Any, list[int], list[str]]:
    """Transformers' settings of generation, the tokens that end it, and the texts.

    Of the model's own generation_config.json it keeps where to stop and which tokens never come; how to choose among
    the others this command says.
    """
    from transformers import GenerationConfig  # slow to import

    own, tokenizer = model.network.generation_config, model.tokenizer
    known = tokenizer.get_vocab()
    tokens = {stop: known[stop] for stop in how.stop if stop in known and known[stop] in tokenizer.all_special_ids}
    tokens |= {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.content in how.stop}
    said = own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id
    ends = [*(said if isinstance(said, list) else [] if said is None else [said]), *tokens.values()]
    if any(not stop for stop in how.stop):
        raise DataError("--stop '': an empty text would stop before anything is written")
    pad = next((i for i in (own.pad_token_id, tokenizer.pad_token_id, *ends) if i is not None), 0)
    kept = {name: value for name in _OF_TOKENS if (value := getattr(own, name, None)) is not None}
    settings = GenerationConfig(
        max_new_tokens=room, do_sample=False, eos_token_id=ends or None, pad_token_id=pad, **kept
    )
    return settings, ends, [stop for stop in how.stop if stop not in tokens]


_OF_TOKENS = ("bos_token_id", "suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias")
"""Settings of a model's generation that are about single tokens, and hold however the next one is chosen."""
