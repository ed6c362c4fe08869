"""Converts a checkpoint between Megatron and Hugging Face: one process, tensor by tensor, complete or not at all."""

import importlib.resources
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_ext.architectures.base import Architecture
from megatron_ext.architectures.fields import config_to_hf, config_to_megatron
from megatron_ext.architectures.registry import architecture_for, architecture_of
from megatron_ext.architectures.stored import unstacked
from megatron_ext.checkpoint.safetensors import HuggingFaceSink, HuggingFaceSource
from megatron_ext.checkpoint.shapes import model_shapes
from megatron_ext.checkpoint.store import TOKENIZERS, copy_tokenizer, find_checkpoint
from megatron_ext.checkpoint.tensors import MegatronSink, MegatronSource, TensorSink, TensorSource, TensorSpec
from megatron_ext.config import ModelConfig, to_mapping
from megatron_ext.conversion.checkpoint_model import read_model, tokenizer_directory
from megatron_ext.conversion.engine import (
    Task,
    check_source,
    hf_shapes,
    run_tasks,
    target_specs,
    tasks_to_hf,
    tasks_to_megatron,
)
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.errors import ConversionError
from megatron_ext.files import read_json_object

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Told (bytes written, bytes in all) as a conversion proceeds."""

_EMBEDDING, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Conversion:
    """What a conversion did."""

    direction: str
    """`to Hugging Face` or `to Megatron`."""
    architecture: Architecture
    why: str
    """Why this architecture."""
    model: ModelConfig
    tensors: int
    """Tensors written."""
    bytes: int
    """Bytes of tensors written."""


def is_hugging_face(path: str | Path) -> bool:
    """Whether `path` is a Hugging Face model directory."""
    return (Path(path) / "config.json").is_file()


def convert(
    source: str | Path,
    target: str | Path,
    *,
    dtype: str | None = None,
    tokenizer: str | Path | None = None,
    hf_class: str | None = None,
    force: bool = False,
    progress: Progress = lambda done, total: None,
) -> Conversion:
    """Convert `source` to the other format; the direction follows from what it is.

    Args:
        dtype: `fp32`, `bf16` or `fp16`; None keeps what the source has.
        tokenizer: directory whose tokenizer goes into a Hugging Face export. Default: the checkpoint's own.
        hf_class: the Hugging Face class to export as. Default: the first that reproduces the model.
        force: replace an existing target.

    Raises:
        ConversionError, CheckpointError: nothing that looks complete is left behind.
    """
    if is_hugging_face(source):
        return _to_megatron(Path(source), Path(target), _DTYPES.get(dtype or ""), force, progress)
    if find_checkpoint(source) is not None:
        stored = _DTYPES.get(dtype or "")
        return _to_hugging_face(Path(source), Path(target), stored, tokenizer, hf_class, force, progress)
    raise ConversionError(
        f"{source}: neither a Hugging Face directory (config.json) nor a Megatron checkpoint (iter_*)"
    )


def _to_hugging_face(
    source: Path,
    target: Path,
    dtype: torch.dtype | None,
    tokenizer: str | Path | None,
    hf_class: str | None,
    force: bool,
    progress: Progress,
) -> Conversion:
    model = read_model(source)
    architecture, why = architecture_for(model, hf_class)
    stream = MegatronSource(source)
    check_source(stream, model_shapes(model), where=str(stream.directory))
    vocabulary = Path(tokenizer) if tokenizer is not None else tokenizer_directory(source)
    tasks = list(tasks_to_hf(architecture.weights, model))
    specs = target_specs(iter(tasks), stream, dtype)
    if tokenizer is not None and Tokenizer(tokenizer).vocab_size > model.vocab_size:
        raise ConversionError(f"{tokenizer} has more tokens than the model's vocab_size, {model.vocab_size}")
    with HuggingFaceSink(target, specs, force=force, inputs=[stream.directory]) as sink:
        stored = next(iter(specs.values())).dtype
        _copy_tokenizer(vocabulary, sink.partial)
        _write_config(architecture, model, stored, sink.partial)
        _run(tasks, stream, sink, specs, progress)
    return _summary("to Hugging Face", architecture, why, model, specs)


def _to_megatron(source: Path, target: Path, dtype: torch.dtype | None, force: bool, progress: Progress) -> Conversion:
    architecture, model = read_hugging_face_model(source)
    stream = unstacked(HuggingFaceSource(source), architecture, model)
    check_hugging_face(stream, architecture, model, where=str(source))
    tasks = list(tasks_to_megatron(architecture.weights, model))
    specs = target_specs(iter(tasks), stream, dtype)
    tokenizer = source if any((source / name).is_file() for name in TOKENIZERS) else None
    run = {"model": to_mapping(model)}
    with MegatronSink(target, specs, run, tokenizer=tokenizer, force=force, inputs=[source]) as sink:
        _run(tasks, stream, sink, specs, progress)
    return _summary("to Megatron", architecture, f"config.json names {architecture.hf_class}", model, specs)


def read_hugging_face_model(directory: str | Path) -> tuple[Architecture, ModelConfig]:
    """The architecture and model configuration of a Hugging Face directory."""
    path = Path(directory) / "config.json"
    raw = read_json_object(path, ConversionError)
    architecture = architecture_of(raw, source=str(path))
    return architecture, config_to_megatron(architecture.config, raw, source=str(path))


def check_hugging_face(stream: TensorSource, architecture: Architecture, model: ModelConfig, *, where: str) -> None:
    """Account for every tensor of a Hugging Face directory.

    Raises:
        ConversionError: naming those that are missing, unexpected or misshapen.
    """
    tied = not model.untie_embeddings_and_output_weights
    may_repeat = frozenset({_OUTPUT} if tied else ())
    check_source(stream, hf_shapes(architecture.weights, model), where=where, ignore=may_repeat)
    # transformers leaves a tied model's output layer alone where the file has another one.
    if tied and _OUTPUT in stream.specs and not torch.equal(stream.read(_OUTPUT), stream.read(_EMBEDDING)):
        raise ConversionError(
            f"{where}: config.json ties {_OUTPUT} to {_EMBEDDING}, but the weights are not equal; "
            "set tie_word_embeddings: false there if both are meant"
        )


def _run(
    tasks: list[Task], source: TensorSource, sink: TensorSink, specs: dict[str, TensorSpec], progress: Progress
) -> None:
    total, done = _total_bytes(specs), 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    run_tasks(iter(tasks), source, sink, advance)


def _total_bytes(specs: dict[str, TensorSpec]) -> int:
    return sum(torch.Size(spec.shape).numel() * spec.dtype.itemsize for spec in specs.values())


def _summary(
    direction: str, architecture: Architecture, why: str, model: ModelConfig, specs: dict[str, TensorSpec]
) -> Conversion:
    return Conversion(direction, architecture, why, model, len(specs), _total_bytes(specs))


def _write_config(architecture: Architecture, model: ModelConfig, dtype: torch.dtype, directory: Path) -> None:
    """Write config.json, generation_config.json and the modelling code that the architecture ships."""
    special = _special_tokens(directory)
    name = str(dtype).removeprefix("torch.")
    content = {
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
    (directory / "config.json").write_text(json.dumps(content, indent=2) + "\n")
    (directory / "generation_config.json").write_text(json.dumps(special, indent=2) + "\n")
    for file_name in architecture.code:
        (directory / file_name).write_text(shipped_code(file_name))


def shipped_code(file_name: str) -> str:
    """Source text of a modelling file that exports carry."""
    return importlib.resources.files("megatron_ext.conversion.modeling").joinpath(file_name).read_text(encoding="utf-8")


def _special_tokens(directory: Path) -> dict[str, int | None]:
    """Token ids that generation stops at and pads with, from the tokenizer beside."""
    ids: dict[str, int | None] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if (directory / "tokenizer.json").is_file():
        from transformers import AutoTokenizer  # slow to import, and not needed without a tokenizer

        tokenizer = AutoTokenizer.from_pretrained(directory)
        ids = {name: getattr(tokenizer, name) for name in ids}
    return ids


def _copy_tokenizer(source: Path | None, target: Path) -> None:
    if source is None:
        log.warning("the checkpoint carries no tokenizer, so the export has none; pass --tokenizer DIR")
    elif not copy_tokenizer(source, target):
        raise ConversionError(f"{source}: no tokenizer here ({' or '.join(TOKENIZERS)})")
