"""Prompts: texts to continue or conversations to answer, from a command line or a file, as token ids."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint.tokenizer_files import SETTINGS_FILE
from megatron_ext.data.prepare.chat_rows import Conversation, asked_of
from megatron_ext.data.prepare.chat_template import ChatTemplate
from megatron_ext.data.prepare.corpus import corpus_files, ending_of, split_into_shards
from megatron_ext.data.prepare.documents import read_rows
from megatron_ext.data.prepare.faults import BadDocument
from megatron_ext.errors import DataError
from megatron_ext.foreign import reading
from megatron_ext.generation.text_model import TextModel


@dataclass(frozen=True)
class Prompt:
    """What a model continues or answers."""

    text: str
    """To be continued; of a conversation what is asked last, for people."""
    conversation: Conversation | None = None
    """To be answered, as the chat template writes it."""
    where: str = ""
    """The file and row that it is from."""

    def shown(self) -> str:
        """It in a few words, for messages."""
        short = self.text if len(self.text) <= 40 else f"{self.text[:37]}..."
        return f"{self.where and self.where + ': '}the prompt {short!r}"


def command_line_prompts(texts: Sequence[str], *, chat: bool, system: str | None = None) -> list[Prompt]:
    """The prompts that `texts` are; with `chat` each is a question, or a JSON list of messages.

    Args:
        system: with `chat`, what a system message says before each that has none.
    """
    if not chat:
        return [Prompt(text) for text in texts]
    return [_asked(_messages(text), system, "") for text in texts]


def read_prompts(path: str | Path, *, chat: bool, system: str | None = None) -> list[Prompt]:
    """The prompts of a file: each line of a .txt; else rows with a `prompt` or `text`, or with a conversation.

    A conversation is answered from where its last question ends: what is there of an answer is left out.

    Args:
        chat: texts are questions; otherwise they are continued.
        system: as for `command_line_prompts`.

    Raises:
        DataError: a row that is no prompt, or none at all; names the file and row.
    """
    prompts = list(_read(Path(path), chat=chat, system=system))
    if not prompts:
        raise DataError(f"{path}: holds no prompt")
    return prompts


def _read(path: Path, *, chat: bool, system: str | None) -> Iterator[Prompt]:
    rows = (row for _, row in _rows(path))
    if ending_of(path) == ".txt":
        rows = ({"prompt": line} for row in rows for line in row["text"].splitlines() if line.strip())
    for number, row in enumerate(rows, start=1):
        where, text = f"{path}, row {number}", row.get("prompt", row.get("text"))
        if not isinstance(text, str | list | None):
            raise DataError(f"{where}: {'prompt' if 'prompt' in row else 'text'} = {text!r}: expected a text")
        if "messages" in row or "conversations" in row or not isinstance(text, str):
            yield _asked(row, system, where)
        else:
            yield _asked(_messages(text), system, where) if chat else Prompt(text, where=where)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for shard in split_into_shards(corpus_files([path]), shard_bytes=1 << 62):
        yield from read_rows(shard)


def _messages(text: str) -> list[Any]:
    """Of a text that is a JSON list, its messages; else one question."""
    if text.lstrip().startswith("["):
        try:
            messages = json.loads(text)
        except ValueError:
            messages = None
        if isinstance(messages, list) and all(isinstance(message, dict) for message in messages) and messages:
            return messages
    return [{"role": "user", "content": text}]


def _asked(row: Mapping[str, Any] | Sequence[Any], system: str | None, where: str) -> Prompt:
    row = row if isinstance(row, Mapping) else {"messages": row}
    try:
        asked = asked_of(row)
    except BadDocument as error:
        raise DataError(f"{where and where + ': '}{error}") from error
    messages = list(asked.messages)
    if system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return Prompt(str(messages[-1].get("content", "")), Conversation(messages, tools=asked.tools), where)


class Encoder:
    """Prompts as the token ids that a model goes on from.

    Args:
        template: of conversations; default: that of the tokenizer.
    """

    def __init__(self, model: TextModel, template: str | None = None) -> None:
        self._model, self._text = model, template
        self._template: ChatTemplate | None = None

    def encode(self, prompt: Prompt) -> list[int]:
        """The ids of `prompt`, or of what the chat template writes up to the answer.

        Raises:
            DataError: there are none or too many, the model has no row for one, or the template refuses it.
        """
        model = self._model
        with reading(model.name, DataError, kind="a tokenizer", advice=f"{SETTINGS_FILE} may say what it cannot"):
            if prompt.conversation is None:
                ids = model.tokenizer(prompt.text)["input_ids"]
            else:
                # The template writes what the tokenizer would put around a text.
                ids = model.tokenizer(self._rendered(prompt), add_special_tokens=False)["input_ids"]
        if not ids:
            raise DataError(f"the prompt {prompt.text!r} has no tokens to start from; begin it with a word")
        if (largest := max(ids)) >= model.rows:
            token = model.tokenizer.convert_ids_to_tokens(largest)
            raise DataError(
                f"{prompt.shown()} has token {largest} ({token!r}), but {model.name} embeds {model.rows} tokens only: "
                "its tokenizer is larger than the model"
            )
        if model.positions is not None and len(ids) >= model.positions:
            raise DataError(
                f"{prompt.shown()} has {len(ids):,} tokens, but {model.name} has learned {model.positions:,} "
                f"positions only (max_position_embeddings); give at most {model.positions - 1:,} tokens"
            )
        return list(ids)

    def _rendered(self, prompt: Prompt) -> str:
        assert prompt.conversation is not None
        if self._template is None:
            self._template = ChatTemplate(self._model.tokenizer, Path(self._model.name), self._text)
        try:
            return self._template.prompt(prompt.conversation)
        except BadDocument as error:
            raise DataError(f"{prompt.shown()}: {error}") from error
