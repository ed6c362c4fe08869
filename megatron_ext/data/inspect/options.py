"""What is asked of prepared data.

No torch here, nor in what this imports: `--help` answers at once.
"""

from pydantic import Field

from megatron_ext.config.base import PathName, config


@config
class DocumentsOptions:
    """Options of `documents`."""

    prefix: PathName
    """Prepared dataset, as in data.train or by its `.bin`."""
    tokenizer: PathName
    """Directory of the tokenizer that the dataset was made with."""
    first: int = Field(default=0, ge=0)
    """Number of the first document to show; they count from 0."""
    count: int = Field(default=3, ge=1)
    """How many to show."""
    characters: int = Field(default=400, ge=1)
    """How much of each to show."""


@config
class RowsOptions:
    """Options of `rows`."""

    prefix: PathName
    """Prepared chat data, or pairs, without `.bin` / `.idx`."""
    tokenizer: PathName
    """Directory of the tokenizer: the one beside the data."""
    first: int = Field(default=0, ge=0)
    """Number of the first sample to show; they count from 0."""
    count: int = Field(default=3, ge=1)
    """How many to show."""
    characters: int = Field(default=2000, ge=1)
    """How much of each to show."""


@config
class LengthsOptions:
    """Options of `lengths`."""

    prefixes: list[PathName] = Field(min_length=1)
    """Prepared datasets, as in data.train or by their `.bin`."""
    sequence_length: int | None = Field(default=None, ge=2)
    """Say how many documents are longer than that: each is cut, and whatever is read with it begins elsewhere."""
    plot: PathName | None = None
    """Image to write: the share of tokens over document lengths (.png, .svg or .pdf)."""


@config
class MixOptions:
    """Options of `mix`."""

    prefixes: list[PathName] = Field(min_length=1)
    """Prepared datasets, as in data.train or by their `.bin`."""
    tokenizer: PathName
    """Directory of the tokenizer that the datasets were made with."""
    documents: int = Field(default=1000, ge=1)
    """How many documents of each dataset are read, evenly spaced over it."""
    plot: PathName | None = None
    """Image to write: the shares of scripts in each dataset (.png, .svg or .pdf)."""


@config
class PlanOptions:
    """Options of `plan`."""

    run: PathName
    """The run's configuration."""
    overrides: list[str] = Field(default_factory=list)
    """Replace single keys of the run: section.key=value."""


@config
class StepOptions:
    """Options of `step`."""

    run: PathName
    """The run's configuration."""
    step: int = Field(ge=1)
    """The step, counted from 1 as reports do."""
    overrides: list[str] = Field(default_factory=list)
    """Replace single keys of the run: section.key=value."""
    samples: int = Field(default=16, ge=1)
    """How many samples to show."""
    characters: int = Field(default=200, ge=1)
    """How much of each sample to show."""
