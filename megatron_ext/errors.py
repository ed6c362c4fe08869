"""The errors a user can cause; a command line turns any of them into one message and exit code 2."""

import re
from pathlib import Path
from typing import Self

_given: set[str] = set()
"""Relative paths that this command was given."""


class MegatronExtError(Exception):
    """Base of every error whose message is written for the person running the command."""

    is_everywhere = False
    """Whether every rank of the run raises the same: then it is enough that one of each node prints it."""
    speaks: bool | None = None
    """Whether this rank is that one; None: it is if it is the first of its node."""

    def everywhere(self, *, speaks: bool | None = None) -> Self:
        """This error, of which every rank of the run raises the same."""
        self.is_everywhere, self.speaks = True, speaks
        return self


class ConfigError(MegatronExtError):
    """A run, tool or model configuration cannot be used as given."""


class DataError(MegatronExtError):
    """A corpus, tokenizer or indexed dataset is missing, damaged or does not match."""


class CheckpointError(MegatronExtError):
    """A training checkpoint is missing, incomplete or does not fit the run."""


class ConversionError(MegatronExtError):
    """Tensors or config fields of two checkpoints do not correspond."""


class EnvironmentFault(MegatronExtError):
    """The machine, its libraries or the process group cannot run what was asked."""


class TrainingError(MegatronExtError):
    """Training cannot go on, for instance because the loss is not finite."""


def note_path(text: str) -> None:
    """Remember a path as a command was given it, on its command line or in its YAML file."""
    if "://" in text:
        return
    _given.update(name for name in (text, str(Path(text))) if name.strip("./ ") and not Path(name).is_absolute())


def with_absolute_paths(message: str) -> str:
    """`message` with the paths that were given, and all below and beside them, made absolute.

    What is written for both stays, as in `data.tokenizer = tok (= /home/me/tok)`.
    """
    here = f"{Path.cwd()}/"
    for name in sorted(_given, key=len, reverse=True):
        message = _as_path(name).sub(lambda match: here + match[0], message)
    return message


def _as_path(name: str) -> re.Pattern[str]:
    """Where `name` stands in a text as a path. One that might be any word is one where only a path would stand."""
    text, begins, ends = re.escape(name), r"(?<![\w./~-])", r"(?![\w-]| \(=)"
    if "/" in name or "." in name:
        return re.compile(begins + text + ends)
    places = (
        rf"^{text}(?![\w.-]| \(=)",
        rf"(?<=: ){text}(?=:)",
        rf"(?<== ){text}(?![\w.-]| \(=)",
        rf"(?<=['\"(]){text}(?=['\")])",
        rf"{begins}{text}(?=(?:\.\w+)*/|\.(?:yaml|partial|bin|idx)\b)",
    )
    return re.compile("|".join(places), re.MULTILINE)


def named(path: str | Path) -> str:
    """A path as a message names it: one that is relative, with what it is from here."""
    return str(path) if Path(path).is_absolute() else f"{path} (= {Path(path).absolute()})"
