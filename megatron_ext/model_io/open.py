"""Any checkpoint, Megatron or Hugging Face, as one stream of canonically named Megatron tensors."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ext.architectures.registry import architecture_of
from megatron_ext.architectures.tables.base import Architecture
from megatron_ext.architectures.tables.fields import left_behind
from megatron_ext.architectures.tables.normalized import NormalizedHfSource
from megatron_ext.canonical.catalogue import EMBEDDING, OUTPUT, model_shapes
from megatron_ext.checkpoint.find import find_checkpoint, require_directory
from megatron_ext.checkpoint.hf_directory import HuggingFaceSource
from megatron_ext.checkpoint.run_file import read_run
from megatron_ext.checkpoint.state_file import TrainingState, read_state, require_whole_model
from megatron_ext.checkpoint.streams import MegatronSource, TensorSource, TensorSpec
from megatron_ext.checkpoint.tokenizer_files import GENERATION_FILE, TOKENIZER_FOLDER, has_tokenizer
from megatron_ext.config import ModelConfig
from megatron_ext.config.effective_value import effective_value
from megatron_ext.config.model_fields import OUTSIDE_LOGITS
from megatron_ext.errors import CheckpointError, ConversionError
from megatron_ext.files import read_json_object
from megatron_ext.model_io.checkpoint_model import read_model, tokenizer_directory
from megatron_ext.model_io.engine import MEGATRON, check_source, copies, hf_shapes, target_specs, tasks_to_megatron
from megatron_ext.model_io.model_to_write import ModelToWrite

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk, whatever wrote it. Every tensor is accounted for."""

    directory: Path
    """What is read; of a training run, its newest checkpoint."""
    model: ModelConfig
    tensors: TensorSource
    """Canonical names, vocabulary padded."""
    tokenizer: Path | None
    """The folder with its tokenizer, if it has one."""
    architecture: Architecture | None
    """Of a Hugging Face directory; None for a Megatron checkpoint."""
    hf_config: dict[str, Any]
    """config.json of a Hugging Face directory."""
    run: dict[str, Any]
    """The resolved run of a Megatron checkpoint."""
    state: TrainingState
    """Where its training stood, if the checkpoint says so."""
    companion_files: Path
    """Where its tokenizer's files, readable here or not, would stand, and how it stops, samples and chats."""

    @property
    def content(self) -> ModelToWrite:
        """The model as it is, to be written elsewhere."""
        return ModelToWrite(
            self.model,
            list(copies(self.tensors)),
            self.tensors.specs,
            self.tensors,
            [self.directory],
            self.tokenizer,
            self.hf_config,
            self.run,
            self.state,
            companion_files=self.companion_files,
        )


def is_hugging_face(path: str | Path) -> bool:
    """Whether `path` is a Hugging Face model directory."""
    return (Path(path) / "config.json").is_file()


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint of either kind.

    Raises:
        ConversionError: it is neither, or holds other tensors than its configuration says (all are named).
        CheckpointError: it is not there, or cannot be read.
    """
    path = Path(path)
    require_directory(path)
    if is_hugging_face(path):
        return _open_hugging_face(path)
    found = find_checkpoint(path)
    if found is None:
        raise ConversionError(
            f"{path}: neither a Hugging Face directory (config.json) nor a Megatron checkpoint (iter_*)"
        )
    require_whole_model(found)
    model, stream = read_model(path), MegatronSource(path)
    check_source(stream, model_shapes(model), where=str(stream.directory))
    try:
        state = read_state(stream.directory)
    except CheckpointError:
        state = TrainingState()  # weights convert without it
    run, companion_files = read_run(stream.directory), stream.directory / TOKENIZER_FOLDER
    _check_companion_files(companion_files)
    return Checkpoint(stream.directory, model, stream, tokenizer_directory(path), None, {}, run, state, companion_files)


def _check_companion_files(directory: Path) -> None:
    """Raise ConversionError where a file that every conversion reads later is none of its kind."""
    if (path := directory / GENERATION_FILE).is_file():
        read_json_object(path, ConversionError)


def _open_hugging_face(directory: Path) -> Checkpoint:
    _check_companion_files(directory)
    architecture, model = read_hugging_face_model(directory)
    stream = NormalizedHfSource(HuggingFaceSource(directory, _repeated(architecture, model)), architecture, model)
    check_hugging_face(stream, architecture, model, where=str(directory))
    for what, names in stream.dropped.items():
        log.warning("%s: %d tensors are left out, %s and so on: %s", directory, len(names), names[0], what)
    tokenizer = directory if has_tokenizer(directory) else None
    hf_config = read_json_object(directory / "config.json", ConversionError)
    tensors = CanonicalTensors(stream, architecture, model)
    return Checkpoint(directory, model, tensors, tokenizer, architecture, hf_config, {}, TrainingState(), directory)


def warn_of_what_stays(opened: Checkpoint) -> None:
    """Log what config.json says and no Megatron field means: of training, with what to set instead, and to nobody."""
    if (architecture := opened.architecture) is not None:
        raw = opened.hf_config
        for statement in left_behind(architecture.config, raw) + architecture.unread(raw):
            log.warning("%s: %s", opened.directory, statement)


def streams_of_one_shape(checkpoints: Sequence[Checkpoint]) -> list[TensorSource]:
    """The tensors of each model, all with the vocabulary padding of the first.

    Raises:
        ConversionError: they are not the same function of their weights.
    """
    first = checkpoints[0]
    for other in checkpoints[1:]:
        _require_one_shape(first, other)
    return [with_padding(one, first.model.padded_vocab_size) for one in checkpoints]


def with_padding(checkpoint: Checkpoint, rows: int) -> TensorSource:
    """The tensors of a model with the vocabulary padded to `rows`."""
    if checkpoint.model.padded_vocab_size == rows:
        return checkpoint.tensors
    return Repadded(checkpoint.tensors, checkpoint.model.vocab_size, rows)


class Repadded:
    """A model's tensors with another vocabulary padding."""

    def __init__(self, source: TensorSource, vocab_size: int, rows: int) -> None:
        self._source, self._vocab_size, self._rows = source, vocab_size, rows
        self.specs = {
            name: TensorSpec((rows, *spec.shape[1:]), spec.dtype) if name in (EMBEDDING, OUTPUT) else spec
            for name, spec in source.specs.items()
        }

    def read(self, name: str) -> Tensor:
        """One whole tensor."""
        tensor = self._source.read(name)
        if name not in (EMBEDDING, OUTPUT):
            return tensor
        padded = tensor.new_zeros(self._rows, *tensor.shape[1:])
        padded[: self._vocab_size] = tensor[: self._vocab_size]
        return padded


def _require_one_shape(first: Checkpoint, other: Checkpoint) -> None:
    for name, a, b in differing_fields(first.model, other.model):
        raise ConversionError(
            f"models must be of one shape: {name} is {a!r} in {first.directory}, {b!r} in {other.directory}"
        )


def differing_fields(a: ModelConfig, b: ModelConfig) -> Iterator[tuple[str, Any, Any]]:
    """The fields that make two models compute something else, with the value of each."""
    for name in ModelConfig.__dataclass_fields__:
        x, y = effective_value(a, name), effective_value(b, name)
        if name not in OUTSIDE_LOGITS and x != y:
            yield name, x, y


def read_any_model(path: str | Path) -> ModelConfig:
    """The model configuration of a checkpoint of either kind."""
    return read_hugging_face_model(path)[1] if is_hugging_face(path) else read_model(path)


def read_hugging_face_model(directory: str | Path) -> tuple[Architecture, ModelConfig]:
    """The architecture and model configuration of a Hugging Face directory."""
    path = Path(directory) / "config.json"
    raw = read_json_object(path, ConversionError)
    architecture = architecture_of(raw, source=str(path))
    return architecture, architecture.model_of(raw, source=str(path))


def check_hugging_face(stream: TensorSource, architecture: Architecture, model: ModelConfig, *, where: str) -> None:
    """Account for every tensor of a Hugging Face directory.

    Raises:
        ConversionError: naming those that are missing, unexpected or misshapen.
    """
    embedding, repeated = _hf_name(architecture, EMBEDDING), _repeated(architecture, model)
    check_source(stream, hf_shapes(architecture.weights, model), where=where, ignore=repeated)
    # transformers leaves a tied model's output layer alone where the file has another one.
    for name in repeated & stream.specs.keys():
        assert embedding is not None
        if not torch.equal(stream.read(name), stream.read(embedding)):
            raise ConversionError(
                f"{where}: config.json ties {name} to {embedding}, but the weights are not equal; "
                "set tie_word_embeddings: false there if both are meant"
            )


def _repeated(architecture: Architecture, model: ModelConfig) -> frozenset[str]:
    """The name under which a tied model's embedding may stand, or only be listed, as its output layer."""
    output = None if model.untie_embeddings_and_output_weights else _hf_name(architecture, OUTPUT)
    return frozenset() if output is None else frozenset({output})


def _hf_name(architecture: Architecture, canonical: str) -> str | None:
    """The Hugging Face tensor that is `canonical` under another name; None if the table has none."""
    for rule in architecture.weights:
        if rule.megatron == canonical:
            (name,) = rule.hf_names().values()
            return name
    return None


class CanonicalTensors:
    """A Hugging Face model's tensors as Megatron has them, made as they are read."""

    def __init__(self, source: TensorSource, architecture: Architecture, model: ModelConfig) -> None:
        self._source = source
        self._tasks = {task.writes[MEGATRON]: task for task in tasks_to_megatron(architecture.weights, model)}
        self.specs = target_specs(iter(self._tasks.values()), source, None)

    def read(self, name: str) -> Tensor:
        """One whole tensor."""
        task = self._tasks[name]
        made = task.make({role: self._source.read(part) for role, part in task.reads.items()})[MEGATRON]
        return made.to(self.specs[name].dtype)
