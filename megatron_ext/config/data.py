"""What is trained on: sources of prepared data, and the stages that say when how much of each is read."""

from pathlib import PurePath
from typing import Literal

from pydantic import Field

from megatron_ext.config.base import Count, PathName, config
from megatron_ext.config.schedule import Schedule

DEFAULT_MAX_EPOCHS = 4.0
"""Up to here repeated data is worth about as much as new data (Muennighoff et al. 2023, arXiv 2305.16264)."""


@config
class DataSource:
    """One prepared dataset of a blend."""

    path: PathName = Field(min_length=1)
    """Path of the dataset without `.bin` / `.idx`, as tools/preprocess.py wrote it."""
    weight: float = Field(default=1.0, gt=0)
    """Share of the samples drawn from it, relative to the other sources."""
    id: str | None = Field(default=None, min_length=1)
    """Its name in reports; without data.cache_dir its order is drawn from it. Default: from its path, without `/train`,
    or `/validation` in data.validation."""


@config
class StagedSource:
    """One prepared dataset that stages read from. Its key in data.sources is its id, from which its order is drawn."""

    path: PathName = Field(min_length=1)
    """Path of the dataset without `.bin` / `.idx`, as tools/preprocess.py wrote it."""
    order: Literal["shuffled", "file"] = "shuffled"
    """file: read as it stands in the file, for data that was sorted on purpose."""
    max_epochs: float = Field(default=DEFAULT_MAX_EPOCHS, gt=0)
    """A plan that reads it more often is warned of."""
    tokens: float | None = Field(default=None, ge=1)
    """About how many tokens it will have: what a plan is made of before its files are there. Training goes by these."""
    language: str | None = Field(default=None, min_length=1)
    """What it counts as where the plan is looked at for a language that disappears. Default: its id."""


@config
class Amount:
    """How much of a source a stage takes: exactly one of the keys."""

    epochs: float | None = Field(default=None, gt=0)
    """Times the whole source."""
    tokens: float | None = Field(default=None, ge=1)
    """Tokens, rounded to whole samples."""
    samples: int | None = Field(default=None, ge=1)
    """Samples of the stage's sequence length."""


@config
class Stage:
    """One stretch of the run: a mix for some length, or exact amounts. A source goes on where it stopped before."""

    name: str = Field(min_length=1)
    """Its name, which no other stage has."""
    mix: dict[str, float] = Field(default_factory=dict)
    """Share of the samples of each source, by id, relative to the others. With one of tokens, steps, samples."""
    take: dict[str, Amount] = Field(default_factory=dict)
    """Instead of mix: exactly how much of each source; the length of the stage follows."""
    tokens: float | None = Field(default=None, ge=1)
    """Length in tokens, rounded up to whole steps."""
    steps: int | None = Field(default=None, ge=1)
    """Length in optimizer steps."""
    samples: int | None = Field(default=None, ge=1)
    """Length in samples, rounded up to whole steps."""
    sequence_length: int | None = Field(default=None, ge=2)
    """Default: data.sequence_length. The longest of the run must be a multiple of it."""
    global_batch_size: int | None = Field(default=None, ge=1)
    """Default: train.global_batch_size."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Default: train.micro_batch_size."""
    lr_scale: float = Field(default=1.0, gt=0)
    """Factor on the learning rate."""
    transition_tokens: Count = Field(default=0, ge=0)
    """The factor is reached in a straight line over this many tokens, from that of the stage before. 0: at once."""
    schedule: Schedule | None = None
    """A schedule that begins anew here, on purpose, and covers this stage and those after it, until one with another.
    Default: `schedule` of the run goes on."""
    rotary_base: float | None = Field(default=None, gt=0)
    """Base of rotary embedding in this stage. Default: model.rotary_base, also behind a stage with another."""


@config
class DataConfig:
    """Training and validation data. Everything was tokenized before: training only maps ready files."""

    sequence_length: int = Field(ge=2)
    """Tokens a sample."""
    train: list[DataSource] = Field(default_factory=list)
    """The training blend, the same from the first step to the last. Either this or sources and stages."""
    sources: dict[str, StagedSource] = Field(default_factory=dict)
    """What the stages read from, by id."""
    stages: list[Stage] = Field(default_factory=list)
    """The stretches of the run, in order. Those not yet begun may be changed whenever the run goes on; the one under
    way too, from there on."""
    unit_tokens: int | None = Field(default=None, ge=2)
    """Tokens that are read together whatever the sequence length: a multiple of that of each stage, fixed when the run
    begins. Default: the longest of them. Set it where longer sequences may come later."""
    validation: list[DataSource] = Field(default_factory=list)
    """The validation blend. Needed when train.eval_interval is set."""
    tokenizer: PathName = Field(min_length=1)
    """Directory of the tokenizer the data was made with. Its vocabulary must fit the model; exports carry it."""
    cache_dir: PathName | None = None
    """With it, data.train is read in the order of megatron-core's GPTDataset, whose sample indices are kept there; all
    nodes must see it. Without, the order is computed and no index is needed: then also for data.stages."""
    eod_mask_loss: bool = False
    """Leave out the loss at end-of-document tokens."""
    reset_attention_mask: bool = False
    """Tokens attend within their own document only; a document ends with its end-of-document token."""
    reset_position_ids: bool = False
    """Positions count from 0 in each document instead of in each sample. Learned positions follow this; rotary
    embedding depends on distances alone, so with reset_attention_mask it is the same either way."""
    pack_documents: bool = False
    """Samples hold whole documents, packed by best fit, instead of a stretch of the file that cuts those at its ends:
    for a last stage on good data. All stages have one sequence length then, and each process packs when it starts: some
    3 seconds a million documents. Without data.cache_dir; validation is read as ever."""
    num_workers: int = Field(default=0, ge=0)
    """Processes that read ahead on each rank; 0 reads in the training process."""

    @property
    def order(self) -> int:
        """Version of the order of samples: 1 is megatron-core's GPTDataset by index, 2 is computed."""
        return 1 if self.train and self.cache_dir is not None else 2


def source_ids(sources: list[DataSource], split: str = "train") -> list[str]:
    """The ids of the sources of a blend: as stated, or the last names of their paths that tell them apart.

    Args:
        split: the last name of a path that says nothing of its source.
    """
    paths = [PurePath(source.path).parts for source in sources]
    named = [parts[:-1] if parts[-1:] == (split,) and len(parts) > 1 else parts for parts in paths]
    length = 1
    while True:
        ids = [source.id or "/".join(parts[-length:]) for source, parts in zip(sources, named, strict=True)]
        if len(set(ids)) == len(ids) or length >= max(map(len, named)):
            return ids
        length += 1
