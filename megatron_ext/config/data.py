"""What is trained on: prepared datasets and their weights."""

from pydantic import Field

from megatron_ext.config.base import PathName, config


@config
class DataSource:
    """One prepared dataset of a blend."""

    path: PathName
    """Path of the dataset without `.bin` / `.idx`, as tools/preprocess.py wrote it."""
    weight: float = Field(default=1.0, gt=0)
    """Share of the samples drawn from it, relative to the other sources."""


@config
class DataConfig:
    """Training and validation data. Everything was tokenized before: training only maps ready files."""

    sequence_length: int = Field(ge=2)
    """Tokens a sample."""
    train: list[DataSource] = Field(min_length=1)
    """The training blend."""
    validation: list[DataSource] = Field(default_factory=list)
    """The validation blend. Needed when train.eval_interval is set."""
    tokenizer: PathName
    """Directory of the tokenizer the data was made with. Its vocabulary must fit the model; exports carry it."""
    cache_dir: PathName
    """Where sample indices are kept. All nodes must see it."""
    eod_mask_loss: bool = False
    """Leave out the loss at end-of-document tokens."""
    reset_attention_mask: bool = False
    """Tokens attend within their own document only; a document ends with its end-of-document token."""
    reset_position_ids: bool = False
    """Positions count from 0 in each document instead of in each sample. Learned positions follow this; rotary
    embedding depends on distances alone, so with reset_attention_mask it is the same either way."""
    num_workers: int = Field(default=0, ge=0)
    """Processes that read ahead on each rank; 0 reads in the training process."""
