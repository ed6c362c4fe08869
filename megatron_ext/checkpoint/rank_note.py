"""What each rank leaves in an unfinished checkpoint when its own file is on disk, or why it is not.

The first rank looks for these notes instead of asking: a rank that died leaves none, and nobody hangs in a collective.
A note has its name at once and whole. It goes before the checkpoint gets its name.
"""

import base64
import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_ext.checkpoint.torch_dist import ChunkRecord
from megatron_ext.files import UNFINISHED, write_bytes
from megatron_ext.manifest import FileSum


@dataclass(frozen=True)
class RankNote:
    """What one rank has written."""

    file: str
    chunks: list[ChunkRecord]
    sum: FileSum
    """Of the file."""
    random_state: bytes | None
    """As torch.save wrote it."""


@dataclass(frozen=True)
class Failed:
    """Why one rank's part is not there."""

    why: str


def write_note(partial: Path, rank: int, note: RankNote | Failed) -> None:
    """Leave the note of `rank`; OSError where that fails."""
    if isinstance(note, Failed):
        content: dict[str, object] = {"failed": note.why}
    else:
        state = None if note.random_state is None else base64.b64encode(note.random_state).decode()
        chunks = [
            [of.key, _dtype_name(of.dtype), of.global_shape, of.offset, of.size, of.start, of.length]
            for of in note.chunks
        ]
        sums = {"bytes": note.sum.bytes, "crc32": note.sum.crc32}
        content = {"file": note.file, **sums, "random_state": state, "chunks": chunks}
    write_bytes(partial / _name(rank), json.dumps(content, separators=(",", ":")).encode())


def noted_ranks(partial: Path) -> set[int]:
    """The ranks whose notes are there."""
    names = os.listdir(partial)
    return {int(name[2:].split(".")[0]) for name in names if name.startswith("__") and name.endswith(_ENDING)}


def read_note(partial: Path, rank: int) -> RankNote | Failed:
    """The note of `rank`, which is there."""
    content = json.loads((partial / _name(rank)).read_bytes())
    if "failed" in content:
        return Failed(content["failed"])
    chunks = [
        ChunkRecord(key, _dtype(dtype), tuple(shape), tuple(offset), tuple(size), content["file"], start, length)
        for key, dtype, shape, offset, size, start, length in content["chunks"]
    ]
    state = None if content["random_state"] is None else base64.b64decode(content["random_state"])
    return RankNote(content["file"], chunks, FileSum(content["bytes"], content["crc32"]), state)


def remove_notes(partial: Path) -> None:
    """Remove all notes."""
    for rank in noted_ranks(partial):
        with contextlib.suppress(FileNotFoundError):
            (partial / _name(rank)).unlink()


_ENDING = f".note{UNFINISHED}"


def _name(rank: int) -> str:
    return f"__{rank}{_ENDING}"


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
