"""The two files of a PEFT directory, written complete or not at all, and read."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from megatron_ext.errors import ConversionError
from megatron_ext.files import (
    output_place,
    publish_directory,
    read_json_object,
    start_directory,
    write_bytes,
    write_text,
)

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


def write_directory(
    target: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], *, force: bool, inputs: Sequence[Path]
) -> None:
    """Write both files.

    Raises:
        ConversionError: something is there already, or it cannot be written; nothing that looks complete is left.
    """
    place = output_place(target, ConversionError, force=force, contents=(CONFIG_FILE, WEIGHTS_FILE), inputs=inputs)
    try:
        partial = start_directory(place)
        try:
            write_bytes(partial / WEIGHTS_FILE, save(dict(tensors), metadata={"format": "pt"}))
            write_text(partial / CONFIG_FILE, json.dumps(config, indent=2) + "\n")
            publish_directory(partial, place, replace=force)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise ConversionError(f"{target}: cannot be written: {error.strerror}") from error


def read_directory(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors of a PEFT directory.

    Raises:
        ConversionError: a file is missing or is none of its kind.
    """
    config = read_json_object(directory / CONFIG_FILE, ConversionError)
    path = directory / WEIGHTS_FILE
    if not path.is_file():
        raise ConversionError(f"{directory}: has no {WEIGHTS_FILE}; other formats of PEFT are not read")
    try:
        return config, load_file(path)
    except SafetensorError as error:
        raise ConversionError(f"{path}: cannot be read: {error}") from error
