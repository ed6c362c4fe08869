"""What the checkpoints of a real run would be, from its layout alone: bytes and chunks of each rank, and their joining.

The chunks are those that each rank would write: weights where it is its turn among their copies, and its part of the
flat fp32 weights and moments. They are written as notes, joined to `.metadata` and read back by the code of a run, only
without tensors. Buckets of gradients, which cut a few tensors more, are left out.
"""

import math
import resource
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from report import hardware, markdown_table, versions

from megatron_ext.canonical.catalogue import CanonicalTensor, model_shapes, model_tensors
from megatron_ext.canonical.naming import StorageLocation, storage_plan
from megatron_ext.canonical.placement import stages_of
from megatron_ext.checkpoint.metadata import METADATA_FILE
from megatron_ext.checkpoint.rank_note import RankNote, read_note, write_note
from megatron_ext.checkpoint.shards import Shape, shards_of_range
from megatron_ext.checkpoint.torch_dist import ChunkRecord, TorchDistReader, write_metadata
from megatron_ext.config import Layout, RunConfig
from megatron_ext.config.layout import Position
from megatron_ext.manifest import FileSum

Placed = tuple[StorageLocation, Shape, CanonicalTensor]
"""Where it is stored, the global shape there, and what it is."""
STATES = ("param", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Held:
    """The part of a tensor that a rank has."""

    key: str
    global_shape: Shape
    offset: Shape
    shape: Shape
    """With the dimensions in which experts are stacked."""
    is_expert: bool

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)


def plan_text(run: RunConfig, world_size: int, copy_rate: float, disk_rate: float) -> str:
    """The table for a run on so many ranks; rates in GB/s, of a device to its host and of the whole file system."""
    layout = run.resolve(world_size)
    sizes, chunks = [], 0
    tensors = _tensors(run)
    with tempfile.TemporaryDirectory() as folder:
        partial = Path(folder)
        for rank in range(world_size):
            records = list(_records(run, layout, rank, tensors))
            sizes.append(sum(record.length for record in records))
            chunks += len(records)
            note = RankNote(f"__{rank}_0.distcp", records, FileSum(sizes[-1], 0), bytes(16_000))
            write_note(partial, rank, note)
        notes = [path.stat().st_size for path in partial.iterdir()]
        before, begun = _resident(), time.process_time()
        write_metadata(partial, (record for rank in range(world_size) for record in _chunks_of(partial, rank)))
        joined, memory = time.process_time() - begun, _resident() - before
        metadata = (partial / METADATA_FILE).stat().st_size
        begun = time.process_time()
        TorchDistReader(partial)
        opened = time.process_time() - begun
    total, largest = sum(sizes), max(sizes)
    each = " / ".join(f"{size / 1e9:.1f}" for size in (min(sizes), total / world_size, largest))
    rows = [
        ["tensors in all", f"{total / 1e12:.2f} TB, {chunks:,} chunks"],
        ["of a rank: least / mean / most", f"{each} GB"],
        ["host memory of a node of 8, at most", f"{8 * largest / 1e9:.0f} GB"],
        [f"training waits, at {copy_rate:g} GB/s a rank", f"{largest / copy_rate / 1e9:.1f} s"],
        [f"written after, at {disk_rate:g} GB/s in all", f"{total / disk_rate / 1e9:.0f} s"],
        ["on the first rank: largest note, all notes", f"{max(notes) / 1e6:.2f} MB, {sum(notes) / 1e6:.0f} MB"],
        [
            "joining them (measured)",
            f"{joined:.1f} CPU s, {memory / 1e6:.0f} MB more memory, a file of {metadata / 1e6:.0f} MB",
        ],
        ["each rank opens the metadata (measured)", f"{opened:.1f} CPU s"],
    ]
    head = f"{hardware()}. {versions('torch')}. {world_size} ranks."
    return f"{head}\n\n{markdown_table(['what', 'how much'], rows)}"


def _tensors(run: RunConfig) -> list[list[Placed]]:
    """The tensors of each pipeline stage."""
    tensors = model_tensors(run.model)
    stages: list[list[Placed]] = [[] for _ in range(run.parallel.pipeline_model_parallel_size)]
    for name, (place, whole) in storage_plan(model_shapes(run.model)).items():
        stages[stages_of(tensors[name], run.model, run.parallel)[0]].append((place, whole, tensors[name]))
    return stages


def _records(run: RunConfig, layout: Layout, rank: int, tensors: list[list[Placed]]) -> Iterator[ChunkRecord]:
    """What a rank writes."""
    at, start = layout.position(rank), 0
    weight = torch.float32 if run.precision.kind == "fp32" else torch.bfloat16
    distributed = run.parallel.use_distributed_optimizer
    shares = {False: (at.dp * layout.cp + at.cp, layout.dp * layout.cp), True: (at.edp, layout.edp)}
    for experts, (number, share) in shares.items():
        held = [part for part in _held(run, layout, at, tensors[at.pp]) if part.is_expert == experts]
        size = sum(part.size for part in held)
        low, high = (size * n // share for n in (number, number + 1)) if distributed else (0, size * (number == 0))
        for part in held:
            turn = zlib.crc32(f"{part.key} {part.offset}".encode()) % share
            chunks = [(part.key, weight, (0,) * len(part.shape), part.shape)] if number == turn else []
            ranges = shards_of_range(part.shape, max(low, 0), min(high, part.size))
            for offset, shape in ranges:
                chunks += [(f"optimizer.state.{state}.{part.key}", torch.float32, offset, shape) for state in STATES]
            low, high = low - part.size, high - part.size
            for key, dtype, offset, shape in chunks:
                place = tuple(a + b for a, b in zip(part.offset, offset, strict=True))
                length = math.prod(shape) * dtype.itemsize
                yield ChunkRecord(key, dtype, part.global_shape, place, shape, f"__{rank}_0.distcp", start, length)
                start += length


def _held(run: RunConfig, layout: Layout, at: Position, tensors: list[Placed]) -> Iterator[Held]:
    """The parts of tensors that a rank has the copy of that is saved: of a gated fc1 two."""
    for place, whole, tensor in tensors:
        number, degree = (at.etp, layout.etp) if tensor.is_expert else (at.tp, layout.tp)
        if tensor.is_expert and place.index[-1] * layout.ep // (run.model.num_moe_experts or 1) != at.ep:
            continue
        if tensor.tp_dimension is None and number:
            continue
        stacked, axis = len(place.index), tensor.tp_dimension or 0
        halves = 2 if "linear_fc1" in tensor.name else 1
        width = tensor.shape[axis] // halves // (degree if tensor.tp_dimension is not None else 1)
        shape = tuple(width if n == axis else size for n, size in enumerate(tensor.shape))
        for half in range(halves):
            start = half * (tensor.shape[axis] // halves) + (number * width if tensor.tp_dimension is not None else 0)
            offset = tuple(start if n == axis else 0 for n in range(len(shape)))
            yield Held(place.key, whole, (*place.index, *offset), (1,) * stacked + shape, tensor.is_expert)


def _chunks_of(partial: Path, rank: int) -> list[ChunkRecord]:
    note = read_note(partial, rank)
    assert isinstance(note, RankNote)
    return note.chunks


def _resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
