"""Puts the present modelling code into an export of an earlier version, whose weights stay the same files."""

import json
import os
import shutil
import tempfile
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from megatron_ext.architectures.registry import ARCHITECTURES
from megatron_ext.architectures.tables.base import Architecture
from megatron_ext.errors import ConversionError, MegatronExtError
from megatron_ext.files import UNFINISHED, publish_directory, read_json_object
from megatron_ext.manifest import read_manifest, write_manifest
from megatron_ext.model_io.compare import Comparison, Verification, verify
from megatron_ext.model_io.figures import lines_of
from megatron_ext.model_io.huggingface.companion_files import shipped_code
from megatron_ext.model_io.huggingface.model_card import MODEL_CARD, replace_verification
from megatron_ext.model_io.open import read_any_model


def refresh_code(directory: str | Path, how: Comparison | None = None) -> tuple[list[str], Verification | None]:
    """Replace the modelling code of the export in `directory`, and `auto_map` in its config.json.

    The new directory is made beside, with links to the same weights, and takes the place of the old one when it is
    complete.

    Args:
        how: compare the model with megatron-core's own of these weights first, and generate with it.

    Returns:
        The names of the files that changed, none where all are as they should be, and the comparison.

    Raises:
        ConversionError: `directory` is no export of a class whose code this framework ships, or its model would not
            be the same one. It stays as it is.
    """
    place = Path(directory).resolve()
    architecture = _architecture(directory)
    read_any_model(place)
    partial = Path(tempfile.mkdtemp(prefix=f".{place.name}.", suffix=UNFINISHED, dir=place.parent))
    try:
        shutil.copytree(place, partial, symlinks=True, copy_function=_link, dirs_exist_ok=True)
        changed = _write_code(partial, architecture)
        verification = None
        if how is not None:
            _renew_manifest(partial, changed)
            verification = _verified(directory, partial, how)
            replace_verification(partial, lines_of(verification))
        if changed or verification is not None:
            _renew_manifest(partial, {*changed, MODEL_CARD})
            shutil.copymode(place, partial)
            publish_directory(partial, place)
    except MegatronExtError as error:
        # The unfinished place has the same files, and is gone when people read this.
        raise type(error)(str(error).replace(str(partial), str(place))) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return changed, verification


def _renew_manifest(partial: Path, touched: Collection[str]) -> None:
    """Sum up the files that were `touched`; what the manifest says of the others stays, so that damage is found."""
    if (before := read_manifest(partial, ConversionError)) is not None:
        kept = {name: known for name, known in before.items() if name not in touched and (partial / name).is_file()}
        write_manifest(partial, kept)


def _architecture(directory: str | Path) -> Architecture:
    config = Path(directory) / "config.json"
    if not config.is_file():
        raise ConversionError(f"{directory}: no Hugging Face directory, it has no config.json; nothing to refresh")
    named = read_json_object(config, ConversionError).get("architectures")
    ours = [a for a in ARCHITECTURES if a.code]
    found = next((a for a in ours if named == [a.hf_class]), None)
    if found is None:
        raise ConversionError(
            f"{config}: architectures = {named!r}; only exports of {', '.join(a.hf_class for a in ours)} carry code of "
            "this framework, so that there is nothing to refresh"
        )
    return found


def _link(source: str, target: str) -> str:
    """A second name of the same file, which costs neither time nor room; a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


def _write_code(partial: Path, architecture: Architecture) -> list[str]:
    """Write what is not as this version writes it; never into a file that is linked to the old directory."""
    changed = []
    for name in architecture.code:
        path, text = partial / name, shipped_code(name)
        if path.is_file() and path.read_text(encoding="utf-8", errors="replace") == text:
            continue
        path.unlink(missing_ok=True)
        path.write_text(text, encoding="utf-8")
        changed.append(name)
    for path in sorted(partial.glob("*_megatron_ext*.py")):
        if path.name not in architecture.code:  # of another version, which had more files
            path.unlink()
            changed.append(path.name)
    config = partial / "config.json"
    content = read_json_object(config, ConversionError)
    if content.get("auto_map") != dict(architecture.auto_map):
        config.unlink()
        config.write_text(json.dumps({**content, "auto_map": dict(architecture.auto_map)}, indent=2) + "\n")
        changed.append(config.name)
    return changed


def _verified(directory: str | Path, partial: Path, how: Comparison) -> Verification:
    result = verify(partial, partial, replace(how, first_by_megatron=True))
    if not result.passed:
        figures = "\n".join(f"  {line}" for line in lines_of(result))
        raise ConversionError(f"{directory}: left as it is; with this version's code:\n{figures}")
    return result
