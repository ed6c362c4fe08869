"""What a preparation makes of documents: token files of text, or something else through the same workers and parts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_ext.data.indexed import token_dtype
from megatron_ext.data.prepare.encoder import load_compiled_code
from megatron_ext.data.prepare.shard_work import ShardWorker, Task, TextOptions
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.data.tokenizer.apart import tokenizer_apart


class Worker(Protocol):
    """What does the shards of one process."""

    def do(self, task: Task) -> None:
        """Write the part of a shard."""


class Preparation(Protocol):
    """What is made of documents; it is sent to other processes."""

    @property
    def contents(self) -> tuple[str, ...]:
        """Patterns of the files that it makes beside those of text."""

    def tokenizer(self, directory: str | Path) -> Tokenizer:
        """The tokenizer of a directory, loaded for the command."""

    def dtype(self, tokenizer: Tokenizer) -> np.dtype[Any]:
        """Of what workers write."""

    def describe(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """What the result depends on, beside text, tokenizer and `TextOptions`."""

    def load(self) -> None:
        """Load what a worker's process needs, before it knows the tokenizer."""

    def worker(self, work: Path, options: TextOptions, tokenizer: Tokenizer) -> Worker:
        """A worker that writes parts to `work`."""

    def finish(
        self, output: Path, splits: Mapping[str, dict[str, Any]], tokenizer: Tokenizer
    ) -> Mapping[str, dict[str, Any]]:
        """Make of the joined files in `output` those that are read; what dataset.json says of each split."""


class PlainText:
    """Texts to token files, as they are joined."""

    contents: tuple[str, ...] = ()

    def tokenizer(self, directory: str | Path) -> Tokenizer:
        """See `Preparation`."""
        return tokenizer_apart(directory)

    def dtype(self, tokenizer: Tokenizer) -> np.dtype[Any]:
        """See `Preparation`."""
        return token_dtype(tokenizer.vocab_size)

    def describe(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """See `Preparation`."""
        return {}

    def load(self) -> None:
        """See `Preparation`."""
        load_compiled_code()

    def worker(self, work: Path, options: TextOptions, tokenizer: Tokenizer) -> Worker:
        """See `Preparation`."""
        return ShardWorker(work, options, tokenizer)

    def finish(
        self, output: Path, splits: Mapping[str, dict[str, Any]], tokenizer: Tokenizer
    ) -> Mapping[str, dict[str, Any]]:
        """See `Preparation`."""
        return splits


PLAIN_TEXT: Preparation = PlainText()
