"""Prepares conversations for training: workers encode rows to samples with masks, and what they wrote becomes files."""

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_ext.checkpoint.tokenizer_files import GENERATION_FILE, SETTINGS_FILE, copy_tokenizer
from megatron_ext.data.dataset import DATASET_FILE
from megatron_ext.data.prepare.chat_files import RECORD, chat_record, pair_record, unpack_split
from megatron_ext.data.prepare.chat_rows import BadRow, Conversation, Left, Pair, conversation_of, pair_of
from megatron_ext.data.prepare.chat_samples import ChatEncoder
from megatron_ext.data.prepare.chat_template import ChatTemplate, read_template
from megatron_ext.data.prepare.documents import read_rows, where_in
from megatron_ext.data.prepare.faults import GOING_ON, Faults
from megatron_ext.data.prepare.join import FILE_SHIFT
from megatron_ext.data.prepare.parts import DOCUMENT, Told
from megatron_ext.data.prepare.shard_work import SPLITS, Task, TextOptions, hash_of, mixed, splits_of
from megatron_ext.data.prepare.template_variables import read_variables
from megatron_ext.data.supervised import TEMPLATE_FILE, TOKENIZER_FOLDER, fingerprint_of
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.data.tokenizer.load import load_tokenizer
from megatron_ext.errors import DataError
from megatron_ext.files import read_json_object

_BATCH_TOKENS = 1 << 16
_SAYS_NOTHING = "with an empty answer, which is trained on"
_SAMPLES, _SAMPLE_CHARACTERS = 5, 500
_ORDER = np.uint64(0x6D65676174726F6E)


@dataclass(frozen=True)
class ChatPreparation:
    """Conversations, or pairs of answers, instead of text; all choices about them.

    Attributes:
        kind: what rows hold.
        template_file: a chat template; default: that of the tokenizer.
        turns: all answers of a row are trained on, the last alone, or each in a sample of its own.
        strings: prompts and answers that are strings are text as it is, or turns in the template.
        max_tokens: of a sample.
        long: rows that are longer are left out, or without the turns at their end.
        template_variables: NAME=VALUE, for variables of the template.
    """

    kind: Literal["chat", "preference"] = "chat"
    template_file: str | None = None
    turns: Literal["all", "last", "unroll"] = "all"
    strings: Literal["plain", "chat"] = "plain"
    max_tokens: int | None = None
    long: Literal["drop", "cut"] = "drop"
    template_variables: tuple[str, ...] = ()
    contents: tuple[str, ...] = field(
        default=("*.mask", "*.weights", TOKENIZER_FOLDER, "*.reference-*.safetensors*"), init=False
    )

    def tokenizer(self, directory: str | Path) -> Tokenizer:
        """The tokenizer of a directory; its template needs transformers here, too."""
        return Tokenizer(directory)

    def dtype(self, tokenizer: Tokenizer) -> np.dtype[Any]:
        """Of what workers write."""
        return RECORD

    def describe(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """What the result depends on, beside the options of text; says what is wrong with the template.

        Raises:
            DataError: there is none, or it would train what must not be trained.
        """
        template = self._template(load_tokenizer(tokenizer.directory), tokenizer.directory)
        for warning in template.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        chosen = {name: getattr(self, name) for name in ("turns", "strings", "max_tokens", "long")}
        if self.template_variables:
            chosen["template_variables"] = read_variables(self.template_variables)
        return {"kind": self.kind, "chat_template": fingerprint_of(template.text), **chosen}

    def load(self) -> None:
        """Load what renders templates, before the tokenizer is known."""
        import transformers  # noqa: F401 - slow to import

    def worker(self, work: Path, options: TextOptions, tokenizer: Tokenizer) -> "ChatWorker":
        """What does the shards of one process."""
        return ChatWorker(work, options, tokenizer, self)

    def encoder(self, tokenizer: Tokenizer) -> ChatEncoder:
        """What turns rows into samples."""
        loaded = load_tokenizer(tokenizer.directory)
        template = self._template(loaded, tokenizer.directory)
        cut = self.long == "cut"
        return ChatEncoder(template, loaded, tokenizer, turns=self.turns, max_tokens=self.max_tokens, cut_long=cut)

    def finish(
        self, output: Path, splits: Mapping[str, dict[str, Any]], tokenizer: Tokenizer
    ) -> dict[str, dict[str, Any]]:
        """Turn what was joined into the files that are read; the counts of each split."""
        found, ends = {}, {tokenizer.eod}
        for name, said in splits.items():
            counts = unpack_split(output, name, tokenizer.vocab_size, pairs=self.kind == "preference")
            ends |= counts.ends.keys() & tokenizer.special_ids
            found[name] = {
                "documents": counts.samples,
                "tokens": counts.tokens,
                "bytes": said["bytes"],
                "supervised": counts.supervised,
                "longest": counts.longest,
                "has_weights": counts.has_weights,
                "ends": sorted(counts.ends.keys() & tokenizer.special_ids),
            }
        self._write_tokenizer(output / TOKENIZER_FOLDER, tokenizer, ends)
        return found

    def _template(self, loaded: Any, directory: Path) -> ChatTemplate:
        text = None if self.template_file is None else read_template(self.template_file)
        return ChatTemplate(loaded, directory, text, self.template_variables)

    def _write_tokenizer(self, folder: Path, tokenizer: Tokenizer, ends: set[int]) -> None:
        """The tokenizer with the template that the data was made with, and every token that its answers end with."""
        folder.mkdir()
        copy_tokenizer(tokenizer.directory, folder)
        template = self._template(load_tokenizer(tokenizer.directory), tokenizer.directory)
        (folder / TEMPLATE_FILE).write_text(template.text, encoding="utf-8")
        settings = folder / SETTINGS_FILE
        if settings.is_file() and "chat_template" in (said := read_json_object(settings, DataError)):
            said.pop("chat_template")  # readers differ in which of both they take
            settings.write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        generation = folder / GENERATION_FILE
        before = read_json_object(generation, DataError) if generation.is_file() else {}
        known = before.get("eos_token_id", [])
        stops = sorted({*(known if isinstance(known, list) else [known]), *ends})
        generation.write_text(json.dumps({**before, "eos_token_id": stops}, indent=2) + "\n", encoding="utf-8")


class ChatWorker:
    """Does shards of rows, one after the other, in one process."""

    def __init__(self, work: Path, options: TextOptions, tokenizer: Tokenizer, how: ChatPreparation) -> None:
        self._work, self._options, self._tokenizer, self._how = work, options, tokenizer, how

    @cached_property
    def _encoder(self) -> ChatEncoder:
        return self._how.encoder(self._tokenizer)

    def do(self, task: Task) -> None:
        """Write the part of a shard."""
        told = Told()
        batches = self._batches(task, told)
        task.part(self._work).write(batches, SPLITS, told, in_order=self._options.order == "random")

    def _batches(self, task: Task, told: Told) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        held: list[tuple[np.ndarray, int, bytes]] = []
        size = 0
        for one in self._records(task, told):
            held.append(one)
            size += len(one[0])
            if size > _BATCH_TOKENS:
                yield self._batch(held, task.file)
                held, size = [], 0
        if held:
            yield self._batch(held, task.file)

    def _batch(self, held: list[tuple[np.ndarray, int, bytes]], file: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Numbers of records, the split of each, and what is known of them beside."""
        records = np.zeros(len(held), dtype=DOCUMENT)
        # Of the row, so that all that is made of it stands in one split.
        hashes = np.array([hash_of(row, 8)[0] for _, _, row in held], dtype=np.uint64)
        places = np.array([place for _, place, _ in held], dtype=np.uint64) | np.uint64(file << FILE_SHIFT)
        records["tokens"] = [len(record) for record, _, _ in held]
        records["bytes"] = [len(row) for _, _, row in held]
        records["place"] = places
        records["order"] = mixed(hashes ^ mixed(places ^ _ORDER))
        if self._options.deduplicate:
            both = np.array([hash_of(row + record.tobytes(), 16) for record, _, row in held], dtype=np.uint64)
            records["high"], records["low"] = both[:, 0], both[:, 1]
        return np.concatenate([r for r, _, _ in held]), splits_of(hashes, self._options.split), records

    def _records(self, task: Task, told: Told) -> Iterator[tuple[np.ndarray, int, bytes]]:
        """Records, where each was read, and the row as bytes."""
        faults = Faults(are_fatal=self._options.bad_lines == "stop", advice=GOING_ON)
        for place, row in read_rows(task.shard, faults):
            _add(told.read, "rows")
            data = json.dumps(row, ensure_ascii=False, sort_keys=True, default=str).encode()
            try:
                for record in self._made_of(row, told):
                    yield record, place, data
            except BadRow as error:
                if faults.are_fatal:
                    raise DataError(f"{where_in(task.shard.path, place)}: {error.why}{GOING_ON}") from error
                self._leave(told, task, error.reason, f"{error.why}\n{data.decode()}")
            except Left as left:
                self._leave(told, task, left.reason, data.decode())
        told.bad, told.bad_lines = faults.count, faults.messages

    def _made_of(self, row: Mapping[str, Any], told: Told) -> list[np.ndarray]:
        turns = self._how.strings == "chat"
        if self._how.kind == "preference":
            pair = pair_of(row, strings_are_turns=turns)
            made, answers = [self._pair(pair)], [pair.chosen, pair.rejected]
        else:
            conversation = conversation_of(row, strings_are_turns=turns)
            made, answers = [chat_record(sample) for sample in self._encoder.samples(conversation)], [conversation]
            _add(told.read, conversation.layout)
        if any(map(_says_nothing, answers)):
            _add(told.read, _SAYS_NOTHING)
        return made

    def _pair(self, pair: Pair) -> np.ndarray:
        chosen, rejected = self._encoder.whole(pair.chosen), self._encoder.whole(pair.rejected)
        prompts = [list(one.ids[: one.counts.index(True)]) for one in (chosen, rejected)]
        if prompts[0] != prompts[1]:
            raise BadRow(
                "prompts differ", "the template writes the common prompt in two ways, before chosen and before rejected"
            )
        most = self._how.max_tokens
        if most is not None and max(len(chosen.ids), len(rejected.ids)) > most:
            raise Left("too long")
        return pair_record(chosen, rejected)

    def _leave(self, told: Told, task: Task, reason: str, text: str) -> None:
        seen = _add(told.dropped, reason)
        if seen <= _SAMPLES:
            told.samples.append((reason, str(task.shard.path), text[:_SAMPLE_CHARACTERS]))


def report(directory: str | Path) -> Iterator[str]:
    """Lines for people: rows read, what they were, what was left out, and what each split holds."""
    said = read_json_object(Path(directory) / DATASET_FILE, DataError)
    read = {what: count for what, count in said.get("read", {}).items() if what != "rows"}
    layouts = ", ".join(f"{count:,} {what}" for what, count in read.items())
    left = sum(said["left_out"].values())
    yield f"{said['read']['rows']:,} rows read{f' ({layouts})' if layouts else ''}, {left:,} left out"
    yield from (f"  {count:>8,}  {reason}" for reason, count in said["left_out"].items() if count)
    what, each = ("pairs", 2) if said["kind"] == "preference" else ("samples", 1)
    for name, split in said["splits"].items():
        share = split["supervised"] / split["tokens"]
        yield (
            f"{directory}/{name}: {split['documents'] // each:,} {what}, {split['tokens']:,} tokens, "
            f"{split['supervised']:,} of them trained on ({share:.1%}), longest {split['longest']:,}"
        )
    yield f"{directory}/{TOKENIZER_FOLDER}: for data.tokenizer, the tokenizer with the chat template"


def _says_nothing(conversation: Conversation) -> bool:
    """Whether an answer that is trained on is empty: the model would learn to end at once."""
    said = [text for text, is_trained in conversation.pieces if is_trained]
    for message, is_trained in zip(conversation.messages, conversation.trained, strict=True):
        if is_trained and not message.get("tool_calls"):
            said.append(message.get("content", "") + str(message.get("reasoning_content", "")))
    return any(not text.strip() for text in said)


def _add(counts: dict[str, int], what: str) -> int:
    counts[what] = counts.get(what, 0) + 1
    return counts[what]
