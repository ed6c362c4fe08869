"""Moving tensors on several threads: the same bytes, bounded memory, and one error that ends all of it."""

import threading
from pathlib import Path

import pytest
import torch

from megatron_ext.canonical.seeds import seed_from_name
from megatron_ext.checkpoint.hf_directory import HuggingFaceSink
from megatron_ext.checkpoint.streams import MegatronSink, TensorSink, TensorSpec
from megatron_ext.errors import ConversionError
from megatron_ext.model_io import transfer as module
from megatron_ext.model_io.engine import copies
from megatron_ext.model_io.transfer import transfer

SHAPES = {f"decoder.layers.{n}.mlp.linear_fc1.weight": (16 + 7 * (n % 5), 33) for n in range(40)}


class Memory:
    """A source of random tensors that counts how many bytes its readers hold at once."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.specs = {name: TensorSpec(shape, torch.float32) for name, shape in SHAPES.items()}
        self.most = self.reads = 0
        self._fails_at = fails_at
        self._lock = threading.Lock()
        self._reading = 0

    def read(self, name: str) -> torch.Tensor:
        size = self.specs[name].bytes
        with self._lock:
            self.reads += 1
            self._reading += size
            self.most = max(self.most, self._reading)
        if self.reads == self._fails_at:
            raise ConversionError("cannot be read")
        tensor = torch.randn(self.specs[name].shape, generator=torch.Generator().manual_seed(seed_from_name(0, name)))
        with self._lock:
            self._reading -= size
        return tensor


def sink_of(kind: str, target: Path) -> TensorSink:
    specs = Memory().specs
    return HuggingFaceSink(target, specs, shard_bytes=9000) if kind == "hf" else MegatronSink(target, specs, {})


@pytest.mark.parametrize("kind", ["hf", "megatron"])
def test_any_number_of_workers_writes_the_same_bytes(kind: str, tmp_path: Path) -> None:
    written = []
    for workers in (1, 4):
        done: list[int] = []
        with sink_of(kind, tmp_path / str(workers)) as sink:
            source = Memory()
            transfer(copies(source), source, sink, done.append, workers=workers)
        assert sum(done) == sink.total_bytes
        files = sorted(path for path in (tmp_path / str(workers)).rglob("*") if path.is_file())
        written.append([(path.name, path.read_bytes()) for path in files if path.name != "common.pt"])
    assert [name for name, _ in written[0]] == [name for name, _ in written[1]]
    assert written[0] == written[1]


def test_memory_is_bounded_whatever_the_number_of_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    largest = max(spec.bytes for spec in Memory().specs.values())
    monkeypatch.setattr(module, "IN_FLIGHT", 7 * largest)
    with sink_of("hf", tmp_path / "out") as sink:
        source = Memory()
        transfer(copies(source), source, sink, lambda count: None, workers=16)
    # A task holds what it reads, what it makes of that and what it writes: 3 times its tensor.
    print(f"read at once: {source.most} bytes at most, the largest tensor has {largest}")
    assert source.most <= 7 * largest / 3


def test_a_task_larger_than_the_bound_runs_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IN_FLIGHT", 1)
    with sink_of("hf", tmp_path / "out") as sink:
        source = Memory()
        transfer(copies(source), source, sink, lambda count: None, workers=4)
    assert source.most <= max(spec.bytes for spec in source.specs.values())


@pytest.mark.parametrize("kind", ["hf", "megatron"])
@pytest.mark.parametrize("fails_at", [1, 13, len(SHAPES)])
def test_the_first_error_ends_all_and_leaves_nothing(kind: str, fails_at: int, tmp_path: Path) -> None:
    source, threads = Memory(fails_at), threading.active_count()
    with pytest.raises(ConversionError, match="cannot be read"), sink_of(kind, tmp_path / "out") as sink:
        transfer(copies(source), source, sink, lambda count: None, workers=3)
    assert list(tmp_path.iterdir()) == []
    assert threading.active_count() == threads
