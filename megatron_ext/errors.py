"""The errors a user can cause; a command line turns any of them into one message and exit code 2."""

from pathlib import Path


class MegatronExtError(Exception):
    """Base of every error whose message is written for the person running the command."""


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


def named(path: str | Path) -> str:
    """A path as a message names it: one that is relative, with what it is from here."""
    return str(path) if Path(path).is_absolute() else f"{path} (= {Path(path).absolute()})"
