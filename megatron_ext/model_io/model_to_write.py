"""A model that is to be written, whatever it is made of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ext.checkpoint.state_file import TrainingState
from megatron_ext.checkpoint.streams import TensorSource, TensorSpec
from megatron_ext.config import ModelConfig
from megatron_ext.model_io.engine import TensorTask


@dataclass(frozen=True)
class ModelToWrite:
    """A model that is to be written: what makes its canonical tensors, and what belongs beside them."""

    model: ModelConfig
    tasks: Sequence[TensorTask]
    """Make every canonical tensor of `model` out of those of `stream`."""
    specs: Mapping[str, TensorSpec]
    """Of the canonical tensors."""
    stream: TensorSource
    inputs: Sequence[Path]
    """What is read; never replaced."""
    tokenizer: Path | None = None
    """Folder with the tokenizer."""
    hf_config: Mapping[str, Any] = field(default_factory=dict)
    """config.json of the model this one is made of, where it had one."""
    run: Mapping[str, Any] = field(default_factory=dict)
    """The resolved run that trained it, where one did."""
    state: TrainingState = field(default_factory=TrainingState)
    """How far it is trained."""
    made_of: str = ""
    """Of what other models it is made and how, for its card; empty where it is the same model as before."""
    companion_files: Path | None = None
    """Folder of the model's own tokenizer, readable here or not, and of how it stops, samples and chats."""
