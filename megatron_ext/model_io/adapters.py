"""Adapters on disk, the base that they belong to, and both together as one stream of tensors."""

#   y = W x + scale * B (A x); the sum W + scale * B A is computed in fp32

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ext.architectures.tables.rules import GateUp, Qkv
from megatron_ext.canonical.adapters import AdapterPair, adapter_pairs, adapter_tensors, projection_rows
from megatron_ext.canonical.catalogue import EMBEDDING, OUTPUT
from megatron_ext.canonical.naming import storage_plan
from megatron_ext.checkpoint.find import require_checkpoint
from megatron_ext.checkpoint.fingerprint import fingerprint, shard_sum
from megatron_ext.checkpoint.run_file import read_run
from megatron_ext.checkpoint.state_file import BASE_KEY, UNTRAINED, TrainingState, read_scalars, read_state
from megatron_ext.checkpoint.streams import MegatronSink, MegatronSource, TensorSource, TensorSpec
from megatron_ext.config import LoraConfig, ModelConfig, load_config, to_mapping
from megatron_ext.errors import CheckpointError, ConversionError
from megatron_ext.foreign import reading
from megatron_ext.model_io.checkpoint_model import read_model, tokenizer_directory
from megatron_ext.model_io.engine import check_source, stored_dtype

Advance = Callable[[int, int], None]
"""Told (bytes read, bytes in all)."""


@dataclass(frozen=True)
class Adapters:
    """The adapters of a run, whole."""

    directory: Path
    model: ModelConfig
    config: LoraConfig
    tensors: TensorSource
    base: Path
    """Where the weights were beside which they were trained."""
    base_fingerprint: str
    state: TrainingState
    run: dict[str, Any]
    tokenizer: Path | None

    @property
    def pairs(self) -> list[AdapterPair]:
        """Every adapter, in the order of the computation."""
        return adapter_pairs(self.model, self.config)

    @property
    def fingerprint(self) -> str:
        """Of their own tensors."""
        return stream_fingerprint(self.tensors, torch.float32, self.model.padded_vocab_size)


def open_adapters(path: str | Path) -> Adapters:
    """Open the checkpoint of a run with adapters (of a directory of them the newest).

    Raises:
        CheckpointError: it holds none, or cannot be read.
        ConversionError: it holds other tensors than its configuration says (all are named).
    """
    directory = require_checkpoint(path)
    record = read_scalars(directory).get(BASE_KEY)
    if record is None:
        raise CheckpointError(f"{directory}: holds a whole model, and no adapters")
    with reading(directory, CheckpointError):
        config = load_config(LoraConfig, record["adapters"], source=str(directory))
        base, trained_with = Path(record["path"]), str(record["fingerprint"])
    model, stream = read_model(directory), MegatronSource(directory)
    shapes = {name: tensor.shape for name, tensor in adapter_tensors(model, config).items()}
    check_source(stream, shapes, where=str(directory))
    state, run = read_state(directory), read_run(directory)
    return Adapters(directory, model, config, stream, base, trained_with, state, run, tokenizer_directory(directory))


def write_adapters(
    target: str | Path,
    tensors: TensorSource,
    model: ModelConfig,
    config: LoraConfig,
    base: Path,
    base_fingerprint: str,
    *,
    tokenizer: Path | None = None,
    force: bool = False,
) -> None:
    """Write adapters from anywhere as a checkpoint of ours, at step 0, to be continued or merged.

    Raises:
        ConversionError: `tensors` are not those of `config`; nothing that looks complete is left behind.
    """
    expected = adapter_tensors(model, config)
    check_source(tensors, {name: tensor.shape for name, tensor in expected.items()}, where="the source")
    run = {"model": to_mapping(model), "adapters": to_mapping(config)}
    record = {"path": str(base.resolve()), "fingerprint": base_fingerprint, "adapters": to_mapping(config)}
    specs = {name: tensors.specs[name] for name in expected}
    scalars = {**UNTRAINED, BASE_KEY: record}
    with MegatronSink(target, specs, run, scalars=scalars, tokenizer=tokenizer, force=force, inputs=[base]) as sink:
        for name in expected:
            sink.write(name, tensors.read(name))


def stream_fingerprint(
    source: TensorSource, dtype: torch.dtype, vocab_size: int, advance: Advance = lambda done, total: None
) -> str:
    """The fingerprint of the tensors of `source` as a run in `dtype` holds them (training/frozen_base.py).

    Args:
        vocab_size: rows of embedding and output layer that are tokens.
    """
    total, done, size = 0, 0, sum(spec.bytes for spec in source.specs.values())
    plan = storage_plan({name: spec.shape for name, spec in source.specs.items()})
    for name, (place, shape) in plan.items():
        tensor = source.read(name).to(stored_dtype(name, source.specs[name].dtype, dtype))
        if name in (EMBEDDING, OUTPUT):
            tensor = tensor[:vocab_size]
        within = len(place.index)
        offset = (*place.index, *(0,) * (len(shape) - within))
        total += int(shard_sum(place.key, offset, tensor.reshape((1,) * within + tuple(tensor.shape))))
        done += source.specs[name].bytes
        advance(done, size)
    return fingerprint(total, dtype)


def require_base(adapters: Adapters, base: TensorSource, where: Path, advance: Advance) -> None:
    """Raise ConversionError where `base`, at `where`, holds other weights than the adapters were trained beside."""
    dtype = getattr(torch, adapters.base_fingerprint.partition(":")[0])
    found = stream_fingerprint(base, dtype, adapters.model.vocab_size, advance)
    if found != adapters.base_fingerprint:
        raise ConversionError(
            f"{where}: holds other weights ({found}) than those beside which {adapters.directory} was trained "
            f"({adapters.base_fingerprint}, of {adapters.base}); give those with --base"
        )


class Losses:
    """What rounding has left of the differences that adapters make, by the kind of weight."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}
        self._lock = threading.Lock()

    def add(self, kind: str, delta: Tensor, stored: Tensor) -> None:
        """Count one weight: the difference it should get, and that which it got."""
        error, size = float((stored - delta).double().square().sum()), float(delta.double().square().sum())
        with self._lock:
            before = self._sums.get(kind, (0.0, 0.0))
            self._sums[kind] = before[0] + error, before[1] + size

    def shares(self) -> dict[str, float]:
        """|stored - true| / |true| of each kind of weight; 0 where there is no difference at all."""
        return {kind: (error / size) ** 0.5 if size else 0.0 for kind, (error, size) in sorted(self._sums.items())}


class WithAdapters:
    """The weights of a base with what adapters add to them.

    Args:
        base: with the vocabulary padding of the adapters' model.
        dtype: of the weights that are changed; None keeps the base's.
    """

    def __init__(self, base: TensorSource, adapters: Adapters, dtype: torch.dtype | None) -> None:
        self._base, self._adapters = base, adapters
        self._pairs: dict[str, list[AdapterPair]] = {}
        for pair in adapters.pairs:
            self._pairs.setdefault(pair.weight, []).append(pair)
        self.specs: Mapping[str, TensorSpec] = {
            name: replace(spec, dtype=dtype or spec.dtype) if name in self._pairs else spec
            for name, spec in base.specs.items()
        }
        self.losses = Losses()

    def read(self, name: str) -> Tensor:
        """One whole weight."""
        weight = self._base.read(name)
        if (pairs := self._pairs.get(name)) is None:
            return weight
        delta = weight_delta(self._adapters.model, name, pairs, self._adapters.tensors)
        dtype = self.specs[name].dtype
        merged = (weight.float() + delta).to(dtype)
        kind = ".".join(part for part in name.split(".") if not part.isdigit()).removesuffix(".weight")
        self.losses.add(kind.removeprefix("decoder.layers."), delta, merged.float() - weight.to(dtype).float())
        return merged


def weight_delta(model: ModelConfig, name: str, pairs: list[AdapterPair], tensors: TensorSource) -> Tensor:
    """What the adapters `pairs` of the weight `name` add to it, in fp32."""
    parts = {
        pair.projection: pair.scale * (tensors.read(pair.b).float() @ tensors.read(pair.a).float()) for pair in pairs
    }
    (pair, *_), module = pairs, name.removesuffix(".weight")
    if pair.is_embedding:
        return parts[pair.projection].t()
    if module.endswith("linear_qkv"):
        return Qkv(name).to_megatron(_complete(model, module, ("q", "k", "v"), parts), model)
    if module.endswith("linear_fc1") and model.gated_linear_unit:
        return GateUp(name).to_megatron(_complete(model, module, ("gate", "up"), parts), model)
    return parts[pair.projection]


def _complete(model: ModelConfig, module: str, names: tuple[str, ...], parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parts of every projection, zeros where it has no adapter."""
    rows, columns = next(iter(parts.values())).shape
    missing = {
        name: torch.zeros(projection_rows(model, module, name, rows * len(names)), columns)
        for name in names
        if name not in parts
    }
    return parts | missing
