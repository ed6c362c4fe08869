"""The model configuration and tokenizer that a Megatron checkpoint carries."""

from pathlib import Path

from megatron_ext.checkpoint.find import require_checkpoint
from megatron_ext.checkpoint.run_file import RUN_FILE, read_run
from megatron_ext.checkpoint.tokenizer_files import TOKENIZER_FOLDER, has_tokenizer
from megatron_ext.config import ModelConfig, load_config
from megatron_ext.errors import CheckpointError


def read_model(checkpoint: str | Path) -> ModelConfig:
    """The model of a Megatron checkpoint (or of the newest one in a directory)."""
    directory = require_checkpoint(checkpoint)
    run = read_run(directory)
    if "model" not in run:
        raise CheckpointError(f"{directory / RUN_FILE}: has no section 'model'")
    return load_config(ModelConfig, run["model"], source=str(directory / RUN_FILE))


def tokenizer_directory(checkpoint: str | Path) -> Path | None:
    """The tokenizer that the checkpoint carries, if it has one."""
    path = require_checkpoint(checkpoint) / TOKENIZER_FOLDER
    return path if has_tokenizer(path) else None
