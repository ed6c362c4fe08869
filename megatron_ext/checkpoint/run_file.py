"""The resolved run in a checkpoint: `run.yaml`, written so that a part of it is never taken for the whole.

A configuration with keys missing is a valid one, of another model: the rest takes its defaults. So the first line has
the checksum of the others. Files of older versions have no such line; they wrote every key in a fixed order, of which
the last ones have always been the same, so a cut file lacks them.
"""

import re
import zlib
from pathlib import Path
from typing import Any

from megatron_ext.config import RunConfig
from megatron_ext.config.base import fields_of
from megatron_ext.config.yaml_text import dump_yaml, parse_yaml
from megatron_ext.errors import CheckpointError
from megatron_ext.files import write_text
from megatron_ext.foreign import reading
from megatron_ext.manifest import check_manifest

RUN_FILE = "run.yaml"

_FIRST_LINE = "# Every key of this run. CRC-32 of what follows: {:08x}\n"
_CHECKSUM = re.compile(r"# Every key of this run\. CRC-32 of what follows: ([0-9a-f]{8})\n")
_LAST_OF_MODEL = "transformer_overrides"
_LAST_OF_RUN = ("runtime", "distributed_timeout_minutes")


def write_run(checkpoint: Path, run: dict[str, Any]) -> None:
    """Write `run`, every key, into a checkpoint."""
    text = dump_yaml(run)
    write_text(checkpoint / RUN_FILE, _FIRST_LINE.format(zlib.crc32(text.encode())) + text)


def read_run(checkpoint: Path) -> dict[str, Any]:
    """The resolved configuration saved in `checkpoint`, as plain mappings.

    Raises:
        CheckpointError: it is missing, changed or cut.
    """
    path = checkpoint / RUN_FILE
    if not path.is_file():
        raise CheckpointError(f"{checkpoint}: has no {RUN_FILE}; it was not written by this framework")
    check_manifest(checkpoint, CheckpointError, only=(RUN_FILE,), checksums=True)
    with reading(path, CheckpointError):
        text = path.read_text(encoding="utf-8")
    if checked := text.startswith("#"):
        stated = _CHECKSUM.match(text)
        if stated is None or int(stated[1], 16) != zlib.crc32(text[stated.end() :].encode()):
            raise CheckpointError(
                f"{path}: was changed or cut after it was written; take it from a copy of the checkpoint, or, where a "
                "change is meant, remove its first line"
            )
    content = parse_yaml(text, source=str(path))
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a mapping of keys, found {type(content).__name__}; was it cut?")
    if not checked and (lacking := _lacking(text, content)):
        raise CheckpointError(f"{path}: ends before {lacking}: a part of it is missing; take it from a copy")
    if fault := _misshapen(content):
        raise CheckpointError(f"{path}: {fault}; it was changed by hand: take it from a copy of the checkpoint")
    return content


def _misshapen(run: dict[str, Any]) -> str | None:
    """What a run that was written cannot hold: sections that are none, sources of data without a path."""
    for section, value in run.items():
        if section in fields_of(RunConfig) and not isinstance(value, dict | None):
            return f"{section} = {value!r}, where a section of keys belongs"
    data = run.get("data") or {}
    for key in ("train", "validation"):
        sources = data.get(key) or []
        if not isinstance(sources, list):
            return f"data.{key} = {sources!r}, where a list of sources belongs"
        for source in sources:
            if not isinstance(source, dict) or not isinstance(source.get("path"), str):
                return f"data.{key} has the source {source!r}, where a mapping with a path belongs"
            if not isinstance(source.get("weight", 1.0), int | float):
                return f"data.{key} has the weight {source['weight']!r}, where a number belongs"
    return None


def _lacking(text: str, run: dict[str, Any]) -> str | None:
    """What the run of an older version lacks if it was cut."""
    model, (section, key) = run.get("model"), _LAST_OF_RUN
    if not isinstance(model, dict) or _LAST_OF_MODEL not in model:
        return f"model.{_LAST_OF_MODEL}"
    # A converted model was written without training.
    if len(run) > 1 and (not isinstance(run.get(section), dict) or key not in run[section]):
        return f"{section}.{key}"
    return None if text.endswith("\n") else "the end of its last line"
