"""What stands beside the weights in a Hugging Face export: configurations, tokenizer, modelling code."""

import importlib.resources
import json
import logging
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ext.architectures.tables.base import Architecture
from megatron_ext.architectures.tables.fields import config_to_hf
from megatron_ext.checkpoint.streams import TensorSpec
from megatron_ext.checkpoint.tokenizer_files import (
    GENERATION_FILE,
    TOKENIZERS,
    VOCABULARIES,
    copy_tokenizer,
    has_tokenizer,
    said_of_tokens,
)
from megatron_ext.errors import ConversionError
from megatron_ext.model_io.huggingface.token_ids import (
    SPECIAL_TOKENS,
    check_reading,
    check_rows,
    read_tokenizer,
    special_tokens,
    write_generation,
)
from megatron_ext.model_io.model_to_write import ModelToWrite

log = logging.getLogger(__name__)


def write_export(
    directory: Path, architecture: Architecture, content: ModelToWrite, specs: Mapping[str, TensorSpec]
) -> None:
    """Write config.json, generation_config.json, the tokenizer and the modelling code that the class needs.

    config.json is made of the table of the class, so that it holds all that the class reads. What nothing reads
    (`unsloth_fixed`, `use_mrope`, `_name_or_path`) is not carried over from a source's, nor are sampling parameters,
    which transformers takes from generation_config.json alone.

    Args:
        content: the model, with its tokenizer and what its configuration said of tokens before.
        specs: the tensors beside; most of their elements have the dtype that config.json names.

    Raises:
        ConversionError: there is no tokenizer where one was given, or the model cannot embed its tokens.
    """
    model, given, beside = content.model, content.tokenizer, content.companion_files
    _copy_beside(given, beside, directory)
    foreign = given is not None and beside is not None and given != beside
    trained = bool(content.run.get("data"))
    where = given or beside or directory
    tokenizer = read_tokenizer(directory, where)
    if tokenizer is not None:
        check_rows(tokenizer, where, model.vocab_size, refuse=trained or foreign)
    said = _said(given if foreign else None) or content.hf_config or _said(beside)
    special = special_tokens(tokenizer, directory, said, vocab_size=model.vocab_size, decides=trained or foreign)
    name = str(_prevailing_dtype(specs)).removeprefix("torch.")
    config = {
        "architectures": [architecture.hf_class],
        "model_type": architecture.model_type,
        **({"auto_map": dict(architecture.auto_map)} if architecture.auto_map else {}),
        **config_to_hf(architecture.config, model),
        **special,
        # transformers 5 reads `dtype`, 4 reads `torch_dtype`.
        "dtype": name,
        "torch_dtype": name,
        "initializer_range": model.init_method_std,
        "use_cache": True,
    }
    _write_json(directory / "config.json", config)
    brought = given is not None and (given / GENERATION_FILE).is_file()
    write_generation(directory / GENERATION_FILE, special, decides=trained or foreign, foreign=foreign and not brought)
    if tokenizer is not None:
        check_reading(tokenizer, directory, where)
    for file_name in architecture.code:
        (directory / file_name).write_text(shipped_code(file_name))


def _said(directory: Path | None) -> dict[str, Any]:
    """What config.json beside a tokenizer says of single tokens; empty where it says nothing of them."""
    said = said_of_tokens(directory) if directory is not None else {}
    return said if any(name in said for name in SPECIAL_TOKENS) else {}


def shipped_code(file_name: str) -> str:
    """Source text of a modelling file that exports carry."""
    return (
        importlib.resources.files("megatron_ext.model_io.huggingface.modeling")
        .joinpath(file_name)
        .read_text(encoding="utf-8")
    )


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _prevailing_dtype(specs: Mapping[str, TensorSpec]) -> Any:
    """The dtype of most bytes; a router's or an expert bias' own does not count."""
    sizes: Counter[Any] = Counter()
    for spec in specs.values():
        sizes[spec.dtype] += spec.bytes
    return sizes.most_common(1)[0][0]


def _copy_beside(tokenizer: Path | None, beside: Path | None, target: Path) -> None:
    """Copy a tokenizer, and how to stop, sample and chat, which a model has without one too."""
    if tokenizer is not None:
        if not copy_tokenizer(tokenizer, target):
            raise ConversionError(f"{tokenizer}: no tokenizer here ({' or '.join(TOKENIZERS)})")
        # Another tokenizer has a chat template of its own, or none.
        if beside is not None and (beside / GENERATION_FILE).is_file() and not (target / GENERATION_FILE).exists():
            shutil.copyfile(beside / GENERATION_FILE, target / GENERATION_FILE)
        return
    if beside is not None:
        copy_tokenizer(beside, target)
    if has_tokenizer(target):
        return
    vocabularies = sorted(path.name for pattern in VOCABULARIES for path in target.glob(pattern))
    if vocabularies:
        log.warning(
            "%s: carried on as it is, but a tokenizer of %s without %s is not read here; transformers' "
            "save_pretrained makes a tokenizer.json, for --tokenizer DIR",
            beside,
            "vocab.json" if "vocab.json" in vocabularies else vocabularies[0],
            " or ".join(TOKENIZERS),
        )
    else:
        log.warning("the checkpoint carries no tokenizer, so the export has none; pass --tokenizer DIR")
