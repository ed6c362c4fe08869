"""What stands beside the weights in a Hugging Face export: configurations, tokenizer, modelling code."""

import importlib.resources
import json
import logging
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ext.architectures.base import Architecture
from megatron_ext.architectures.fields import config_to_hf
from megatron_ext.checkpoint.store import GENERATION_FILE, TOKENIZERS, copy_tokenizer
from megatron_ext.checkpoint.tensors import TensorSpec
from megatron_ext.config import ModelConfig
from megatron_ext.conversion.hugging_face_tokenizer import load_tokenizer
from megatron_ext.errors import ConversionError, DataError
from megatron_ext.files import read_json_object

log = logging.getLogger(__name__)

_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def write_export(
    directory: Path,
    architecture: Architecture,
    model: ModelConfig,
    specs: Mapping[str, TensorSpec],
    *,
    tokenizer: Path | None,
    beside: Path | None,
    hf_config: Mapping[str, Any],
) -> None:
    """Write config.json, generation_config.json, the tokenizer and the modelling code that the class needs.

    config.json is made of the table of the class, so that it holds all that the class reads. What nothing reads
    (`unsloth_fixed`, `use_mrope`, `_name_or_path`) is not carried over from a source's, nor are sampling parameters,
    which transformers takes from generation_config.json alone.

    Args:
        specs: the tensors beside; most of their elements have the dtype that config.json names.
        tokenizer: folder of the tokenizer, and of a generation_config.json to carry on.
        beside: the model's own such folder, of which the latter is taken where `tokenizer` has none.
        hf_config: config.json of the model this one was made of, for token ids that no tokenizer says.
    """
    _copy_beside(tokenizer, beside, directory)
    special = _special_tokens(directory, hf_config)
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
    generation = directory / GENERATION_FILE
    carried = read_json_object(generation, ConversionError) if generation.is_file() else {}
    unsaid = {name: value for name, value in special.items() if carried.get(name) is None}
    _write_json(generation, {**carried, **unsaid})
    for file_name in architecture.code:
        (directory / file_name).write_text(shipped_code(file_name))


def shipped_code(file_name: str) -> str:
    """Source text of a modelling file that exports carry."""
    return importlib.resources.files("megatron_ext.conversion.modeling").joinpath(file_name).read_text(encoding="utf-8")


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _prevailing_dtype(specs: Mapping[str, TensorSpec]) -> Any:
    """The dtype of most bytes; a router's or an expert bias' own does not count."""
    sizes: Counter[Any] = Counter()
    for spec in specs.values():
        sizes[spec.dtype] += spec.bytes
    return sizes.most_common(1)[0][0]


def _special_tokens(directory: Path, hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """Token ids that generation stops at and pads with: the tokenizer's, else those of the model before."""
    ids = {name: hf_config.get(name) for name in _SPECIAL_TOKENS}
    if not (directory / "tokenizer.json").is_file():
        return ids
    try:
        tokenizer = load_tokenizer(directory)
    except DataError as error:
        log.warning("%s; token ids in the export are those of the source's config.json: %s", error, ids)
        return ids
    for name, before in ids.items():
        own = getattr(tokenizer, name)
        # A chat model stops at several tokens, of which its tokenizer knows one.
        if own is not None and not (isinstance(before, list) and own in before):
            ids[name] = own
    return ids


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
    if (target / "vocab.json").is_file():
        log.warning(
            "%s: carried on as it is, but a tokenizer of vocab.json without %s is not read here; transformers' "
            "save_pretrained makes a tokenizer.json, for --tokenizer DIR",
            beside,
            " or ".join(TOKENIZERS),
        )
    else:
        log.warning("the checkpoint carries no tokenizer, so the export has none; pass --tokenizer DIR")
