"""What stands beside the weights in a Hugging Face export: configurations, tokenizer, modelling code."""

import importlib.resources
import json
import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_ext.architectures.base import Architecture
from megatron_ext.architectures.fields import config_to_hf
from megatron_ext.checkpoint.store import TOKENIZERS, copy_tokenizer
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
    hf_config: Mapping[str, Any],
) -> None:
    """Write config.json, generation_config.json, the tokenizer and the modelling code that the class needs.

    Args:
        specs: the tensors beside; most of their elements have the dtype that config.json names.
        tokenizer: folder of the tokenizer, and of a generation_config.json to carry on.
        hf_config: config.json of the model this one was made of, for token ids that no tokenizer says.
    """
    _copy_tokenizer(tokenizer, directory)
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
    generation = directory / "generation_config.json"
    carried = read_json_object(generation, ConversionError) if generation.is_file() else {}
    _write_json(generation, {**special, **carried})
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


def _copy_tokenizer(source: Path | None, target: Path) -> None:
    if source is None:
        log.warning("the checkpoint carries no tokenizer, so the export has none; pass --tokenizer DIR")
    elif not copy_tokenizer(source, target):
        raise ConversionError(f"{source}: no tokenizer here ({' or '.join(TOKENIZERS)})")
