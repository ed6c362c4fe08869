#!/usr/bin/env python
"""Tokenize documents into train, validation and test files for training. Interrupted, it goes on where it was.

python tools/preprocess.py corpus.jsonl ... --tokenizer DIR --output DIR
python tools/preprocess.py chats.jsonl ... --chat --tokenizer DIR --output DIR           for task: {kind: sft}
python tools/preprocess.py pairs.jsonl ... --preference --tokenizer DIR --output DIR     chosen and rejected answers
"""

import os
from typing import Literal

from pydantic import Field

from megatron_ext.command import ending_on_sigterm, parse_command, run_command, script_runs_once
from megatron_ext.config.base import PathName, config, fields_of
from megatron_ext.errors import ConfigError


@config
class PreprocessOptions:
    """Options of this command."""

    inputs: list[PathName] = Field(min_length=1)
    """Text: .jsonl (a document a line), .json (an array of documents), .txt (a document a file), these as .gz or .zst,
    .parquet, .arrow (of the datasets library), or folders of them; links are followed, and what a folder has of other
    kinds is named."""
    tokenizer: PathName
    """Directory of the tokenizer: any that transformers' AutoTokenizer loads. Its eos_token ends every document."""
    output: PathName
    """Directory to write: train, validation and test as .bin and .idx, dataset.json, and manifest.json with sums."""
    text_key: str = "text"
    """Where the text stands in the object of a document; the column of a table."""
    split: list[float] = Field(default_factory=lambda: [0.98, 0.01, 0.01])
    """Shares of train, validation and test, by a hash of each document."""
    order: Literal["random", "file"] = "random"
    """Of the documents in the output: random, or that of the text, for a curriculum that was sorted."""
    bad_lines: Literal["stop", "skip"] = "stop"
    """A line that cannot be read ends the command, or is counted, said and left out."""
    min_characters: int = Field(default=0, ge=0)
    """Shorter documents are left out."""
    max_characters: int | None = Field(default=None, ge=1)
    """Longer documents are left out."""
    max_repetition: float | None = Field(default=None, ge=0, le=1)
    """Documents are left out in which more than this share of all runs of 16 characters stood before."""
    deduplicate: bool = False
    """Keep one of the documents with the same text, by hashes of 128 bits."""
    filters: list[str] = Field(default_factory=list)
    """Filters of your own, as module:Class: called with each text, they return the text or None (see docs/data.md)."""
    chat: bool = False
    """The input holds conversations: messages, ShareGPT, Alpaca, prompt and completion, or text (see
    docs/post_training.md). Only answers of the assistant count in the loss."""
    preference: bool = False
    """The input holds pairs of answers: chosen and rejected, with or without a prompt."""
    chat_template: PathName | None = None
    """With chat or preference: a chat template (.jinja) to use instead of the tokenizer's own. The output holds a copy
    of the tokenizer with it; give that to data.tokenizer of the run, and exports carry it."""
    template_variables: list[str] = Field(default_factory=list)
    """With chat or preference: variables of the template, as NAME=VALUE, such as enable_thinking=false. The copy of the
    template in the output has them as defaults, so that runs and exports write conversations alike."""
    turns: Literal["all", "last", "unroll"] = "all"
    """With chat: every answer of a conversation is trained on, the last alone, or each in a sample of its own (for
    templates that write earlier turns otherwise, such as those that take their reasoning away)."""
    strings: Literal["plain", "chat"] = "plain"
    """With chat or preference, where prompt and answers are strings: text as it is, or turns in the template."""
    max_tokens: int | None = Field(default=None, ge=8)
    """With chat or preference: longest sample; at most data.sequence_length of the run. Plain text is cut into such."""
    long: Literal["drop", "cut"] = "drop"
    """With chat and max_tokens: longer conversations are left out, or as many turns at their end as make them long."""
    workers: int = Field(default_factory=lambda: os.cpu_count() or 1, ge=1)
    """Processes."""
    force: bool = False
    """Replace an existing output."""


_OF_TEXT = ("text_key", "min_characters", "max_characters", "max_repetition", "filters")
_OF_CHAT = ("chat_template", "template_variables", "turns", "strings", "max_tokens", "long")


def _check(o: PreprocessOptions) -> None:
    """Raise ConfigError where an option is given that would mean nothing."""
    if o.chat and o.preference:
        raise ConfigError("--chat and --preference: conversations are prepared, or pairs; give one of both")
    for name in _OF_TEXT if o.chat or o.preference else _OF_CHAT:
        if getattr(o, name) != fields_of(PreprocessOptions)[name].get_default(call_default_factory=True):
            what = "plain text, not with --chat or --preference" if o.chat or o.preference else "--chat or --preference"
            raise ConfigError(f"--{name.replace('_', '-')} = {getattr(o, name)!r}: is an option of {what}")
    if o.preference and (o.turns, o.long) != ("all", "drop"):
        raise ConfigError("--turns and --long: are options of --chat; of a pair what differs is compared, whole")
    if o.long == "cut" and o.max_tokens is None:
        raise ConfigError("--long cut: without --max-tokens nothing is too long")


def main() -> None:
    """Parse the command line and prepare the data."""
    o = parse_command(PreprocessOptions, __doc__, positional=["inputs"])
    _check(o)
    from megatron_ext.data.prepare.chat import ChatPreparation, report
    from megatron_ext.data.prepare.preparation import PLAIN_TEXT, Preparation
    from megatron_ext.data.prepare.preprocess import preprocess
    from megatron_ext.data.prepare.shard_work import TextOptions
    from megatron_ext.progress import byte_progress

    how: Preparation = PLAIN_TEXT
    if o.chat or o.preference:
        how = ChatPreparation(
            kind="chat" if o.chat else "preference",
            template_file=o.chat_template,
            turns=o.turns,
            strings=o.strings,
            max_tokens=o.max_tokens,
            long=o.long,
            template_variables=tuple(o.template_variables),
        )
    options = TextOptions(
        text_key=o.text_key,
        split=tuple(o.split),
        order=o.order,
        bad_lines=o.bad_lines,
        min_characters=o.min_characters,
        max_characters=o.max_characters,
        max_repetition=o.max_repetition,
        deduplicate=o.deduplicate,
        filters=tuple(o.filters),
    )
    with ending_on_sigterm(), script_runs_once(), byte_progress("tokenizing") as progress:
        summary = preprocess(
            o.inputs,
            o.tokenizer,
            o.output,
            how=how,
            options=options,
            workers=o.workers,
            force=o.force,
            progress=progress,
        )
    if o.chat or o.preference:
        for line in report(o.output):
            print(line)
        return
    for name, counts in summary.items():
        print(f"{o.output}/{name}: {counts.documents:,} documents, {counts.tokens:,} tokens")


if __name__ == "__main__":
    run_command(main)
