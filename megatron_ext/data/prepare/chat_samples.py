"""Token ids of conversations and which of them are trained on, each proven by encoding the text in two ways.

A piece is encoded by itself, as a prompt is before an answer is generated; the pieces joined must be the ids of the
whole text. Where a tokenizer treats the beginning of a text in its own way, so that no piece can be read alone, the ids
of the text up to each cut must begin the ids of the whole.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_ext.data.prepare.chat_rows import ASSISTANT, BadRow, Conversation, Left
from megatron_ext.data.prepare.chat_template import ChatTemplate, Pieces
from megatron_ext.data.tokenizer import Tokenizer

_SHOWN = 3
"""Tokens that are shown around a difference."""


@dataclass(frozen=True)
class ChatSample:
    """Token ids of one sample, and for each whether it counts as a label."""

    ids: Sequence[int]
    counts: Sequence[bool]
    weight: float = 1.0

    @property
    def signed(self) -> list[int]:
        """Ids with the mask as their sign: what counts is -1 - id."""
        return [~number if counts else number for number, counts in zip(self.ids, self.counts, strict=True)]


class ChatEncoder:
    """Turns conversations into samples.

    Args:
        loaded: the tokenizer as transformers loads it, for text whose control tokens are tokens.
        tokenizer: the same for text in which they are text.
        turns: all answers of a row are trained on, the last alone, or each in a sample of its own.
        max_tokens: of a sample.
        cut_long: leave out as many turns at the end of a row as make it too long; otherwise it is left out.
    """

    def __init__(
        self,
        template: ChatTemplate,
        loaded: Any,
        tokenizer: Tokenizer,
        *,
        turns: str = "all",
        max_tokens: int | None = None,
        cut_long: bool = False,
    ) -> None:
        self._template, self._loaded, self._tokenizer = template, loaded, tokenizer
        self._turns, self._most, self._cut_long = turns, max_tokens, cut_long

    def samples(self, conversation: Conversation) -> Iterator[ChatSample]:
        """The samples of a row: mostly one.

        Raises:
            BadRow: it must not be trained on.
            Left: nothing of it is.
        """
        if conversation.pieces:
            yield from self._plain(conversation)
            return
        self._require_no_control_tokens(conversation)
        for part in _parts(conversation, self._turns):
            yield self._fitting(part)

    def whole(self, conversation: Conversation) -> ChatSample:
        """The one sample of an answer of a pair, however long.

        Raises:
            BadRow: it must not be trained on.
        """
        self._require_no_control_tokens(conversation)
        if not conversation.pieces:
            return self._encoded(self._template.pieces(conversation))
        (prompt, _), (answer, _) = conversation.pieces
        return self._encoded([(prompt, None), (answer + self._tokenizer.eod_token, 1)])

    def _plain(self, conversation: Conversation) -> Iterator[ChatSample]:
        if len(conversation.pieces) > 1:
            sample = replace(self.whole(conversation), weight=conversation.weight)
            if self._most is not None and len(sample.ids) > self._most:
                raise Left("too long")
            yield sample
            return
        # A text is read as in pretraining; nothing is lost where it is longer than a sample.
        ids = [*self._tokenizer.encode(conversation.pieces[0][0]), self._tokenizer.eod]
        starts = list(range(0, len(ids), self._most or len(ids)))
        if len(starts) > 1 and len(ids) - starts[-1] == 1:
            starts[-1] -= 1  # a token alone has no label
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            yield ChatSample(ids[start:end], [False] + [True] * (end - start - 1), conversation.weight)

    def _fitting(self, conversation: Conversation) -> ChatSample:
        """The sample of a conversation, without the turns at its end that make it too long."""
        while True:
            sample = self._encoded(self._template.pieces(conversation))
            if self._most is None or len(sample.ids) <= self._most:
                return replace(sample, weight=conversation.weight)
            ends = [n for n, message in enumerate(conversation.messages[:-1], start=1) if message["role"] == ASSISTANT]
            if not self._cut_long or not ends or not any(conversation.trained[: ends[-1]]):
                raise Left("too long")
            end = ends[-1]
            conversation = replace(
                conversation, messages=conversation.messages[:end], trained=conversation.trained[:end]
            )

    def _encoded(self, pieces: Pieces) -> ChatSample:
        texts = [text for text, _ in pieces]
        *parts, whole = self._ids([*texts, "".join(texts)])
        counts = _counts(parts, whole, pieces) or self._counts_by_beginnings(parts, whole, pieces)
        bos = self._loaded.bos_token_id
        if bos is not None and whole[:2] == [bos, bos]:
            raise BadRow(
                "begins twice",
                f"it begins with two {self._loaded.bos_token!r}: the template or the row has one too many",
            )
        if not any(counts):
            raise Left("nothing to train on")
        self._require_ends(whole, counts, pieces)
        counts[0] = False  # nothing stands before it that it could be predicted from
        return ChatSample(whole, counts)

    def _counts_by_beginnings(self, parts: Sequence[Sequence[int]], whole: Sequence[int], pieces: Pieces) -> list[bool]:
        """The mask by the ids of the text up to each cut, which must be the beginning of the ids of the whole."""
        texts = [text for text, _ in pieces]
        cuts = ["".join(texts[:number]) for number in range(1, len(texts))]
        lengths = [0]
        for cut, ids in zip(cuts, self._ids(cuts), strict=True):
            if list(whole[: len(ids)]) != list(ids):
                raise BadRow("pieces read otherwise", self._difference(parts, whole, cut, ids))
            lengths.append(len(ids))
        lengths.append(len(whole))
        counts: list[bool] = []
        for (_, number), begin, end in zip(pieces, lengths[:-1], lengths[1:], strict=True):
            counts += [number is not None] * (end - begin)
        return counts

    def _difference(self, parts: Sequence[Sequence[int]], whole: Sequence[int], cut: str, ids: Sequence[int]) -> str:
        at = next((n for n, (a, b) in enumerate(zip(ids, whole, strict=False)) if a != b), min(len(ids), len(whole)))
        first = max(at - _SHOWN, 0)
        shown = [self._loaded.convert_ids_to_tokens(list(one[first : at + _SHOWN])) for one in (ids, whole)]
        return (
            f"the text up to {cut[-20:]!r} is read as ... {shown[0]}, but as ... {shown[1]} where the answer follows: "
            "the model would be trained on other tokens than it generates from. End the prompt of the template with a "
            "control token or a new line, not with a space; --bad-lines skip leaves such rows out"
        )

    def _require_ends(self, ids: Sequence[int], counts: Sequence[bool], pieces: Pieces) -> None:
        """Raise BadRow where an answer that is trained on does not end with a control token."""
        last = [n for n, counted in enumerate(counts) if counted and (n + 1 == len(counts) or not counts[n + 1])]
        if open_ends := [n for n in last if ids[n] not in self._tokenizer.special_ids]:
            token = self._loaded.convert_ids_to_tokens(int(ids[open_ends[0]]))
            raise BadRow(
                "answer without an end",
                f"what is trained on ends with {token!r}, no control token: the model would never learn to stop; the "
                "template must write one behind each answer, within {% generation %} if it has marks",
            )

    def _require_no_control_tokens(self, conversation: Conversation) -> None:
        said = [(f"message {n} ({message['role']})", message) for n, message in enumerate(conversation.messages)]
        for where, content in [*said, ("tools", conversation.tools), ("the row", conversation.pieces)]:
            for text in _strings(content):
                if (token := self._tokenizer.spells(text)) is not None:
                    raise BadRow(
                        "spells a control token",
                        f"{where}: spells the control token {token!r}, which would be read as the token itself; remove "
                        "it from the row, or leave such rows out (--bad-lines skip)",
                    )

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids in which control tokens are tokens, without any that a tokenizer adds."""
        if not texts:
            return []
        read = self._loaded(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=False,
            truncation=False,
            padding=False,
            verbose=False,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        return [list(ids) for ids in read.input_ids]


def _counts(parts: Sequence[Sequence[int]], whole: Sequence[int], pieces: Pieces) -> list[bool] | None:
    """The mask by pieces; None where they are not the whole."""
    if [number for part in parts for number in part] != list(whole):
        return None
    return [number is not None for part, (_, number) in zip(parts, pieces, strict=True) for _ in part]


def _parts(conversation: Conversation, turns: str) -> Iterator[Conversation]:
    """What of a conversation is a sample of its own."""
    if turns == "all":
        yield conversation
        return
    answers = [number for number, is_trained in enumerate(conversation.trained) if is_trained]
    for number in answers if turns == "unroll" else answers[-1:]:
        trained = [n == number for n in range(number + 1)]
        yield replace(conversation, messages=conversation.messages[: number + 1], trained=trained)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from (str(key), *_strings(part))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _strings(part)
