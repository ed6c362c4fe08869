"""Parts of saved tensors are read alone, whatever torch.save wrote; damage is an error."""

import io
import os
from pathlib import Path

import pytest
import torch
from torch.serialization import get_crc32_options, set_crc32_options

from megatron_ext.checkpoint import raw_io
from megatron_ext.checkpoint.raw_io import TensorPlace
from megatron_ext.checkpoint.torch_archive import find_tensor
from megatron_ext.checkpoint.torch_dist import TensorArchive, TorchDistReader, TorchDistWriter, write_metadata
from megatron_ext.errors import CheckpointError

TENSORS = {
    "fp32": torch.randn(7, 5, 3),
    "bf16": torch.randn(9, 4).bfloat16(),
    "int64": torch.arange(11),
    "uint8": torch.arange(13, dtype=torch.uint8),
    "bool": torch.tensor([True, False, True]),
    "scalar": torch.tensor(2.5),
}


def saved(path: Path, tensor: torch.Tensor, before: int = 0) -> tuple[int, int]:
    """Save with torch.save after `before` other bytes; return start and length."""
    with open(path, "wb") as file:
        file.write(b"x" * before)
        torch.save(tensor, file)
    return before, path.stat().st_size - before


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("before", [0, 1001])
def test_the_elements_are_found(name: str, before: int, tmp_path: Path) -> None:
    tensor = TENSORS[name]
    start, length = saved(tmp_path / "x", tensor, before)
    with open(tmp_path / "x", "rb") as file:
        place = find_tensor(file.fileno(), start, length)
        assert place is not None
        assert (place.shape, place.dtype) == (tuple(tensor.shape), tensor.dtype)
        read = torch.empty_like(tensor)
        place.read_box(file.fileno(), tuple(slice(0, size) for size in tensor.shape), read)
    assert torch.equal(read, tensor)


@pytest.mark.parametrize(
    "tensor",
    [torch.randn(4, 6)[:2], torch.randn(4, 6).t(), torch.randn(4).to(torch.float8_e4m3fn), {"a": 1}],
    ids=["part of a storage", "transposed", "float8", "no tensor"],
)
def test_other_contents_are_left_to_torch(tensor: object, tmp_path: Path) -> None:
    start, length = saved(tmp_path / "x", tensor)  # type: ignore[arg-type]
    with open(tmp_path / "x", "rb") as file:
        assert find_tensor(file.fileno(), start, length) is None


def test_what_torch_must_read_is_read_too(tmp_path: Path) -> None:
    """A checkpoint whose chunk is a transposed view, as other writers may leave it."""
    tensor = torch.randn(6, 4)
    writer = TorchDistWriter(tmp_path)
    archive = TensorArchive(tensor)
    archive.pieces = [saved_bytes(tensor.t().contiguous().t())]
    archive.length = len(archive.pieces[0])
    writer.put(archive, writer.reserve("x", (6, 4), (0, 0), archive))
    write_metadata(tmp_path, writer.finish())
    reader = TorchDistReader(tmp_path)
    assert torch.equal(reader.read("x"), tensor)
    assert torch.equal(reader.read("x", (2, 1), (3, 2)), tensor[2:5, 1:3])


def saved_bytes(tensor: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    return buffer.getvalue()


def test_our_archives_are_torch_saves() -> None:
    """Byte for byte, whichever size decides how torch.save hands the elements over, but for checksums nobody reads."""
    assert get_crc32_options(), "what others save keeps its checksums"
    for tensor in (torch.randn(3), torch.randn(5000), torch.zeros(0, 3), torch.tensor(1.0)):
        archive = TensorArchive(tensor)
        set_crc32_options(False)
        try:
            assert b"".join(archive.pieces) == saved_bytes(tensor)
        finally:
            set_crc32_options(True)
        assert torch.equal(torch.load(io.BytesIO(b"".join(archive.pieces)), weights_only=True), tensor)


def test_a_part_of_a_chunk_costs_its_own_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = torch.randn(16, 32, 64)
    monkeypatch.setattr(raw_io, "_MAPPED_FROM", 1 << 40)
    writer = TorchDistWriter(tmp_path)
    writer.write("x", (16, 32, 64), (0, 0, 0), experts)
    write_metadata(tmp_path, writer.finish())
    reader, read = TorchDistReader(tmp_path), 0
    into, some = os.preadv, os.pread

    def counted_into(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal read
        read += (count := into(descriptor, buffers, offset))
        return count

    def counted(descriptor: int, count: int, offset: int) -> bytes:
        nonlocal read
        read += len(data := some(descriptor, count, offset))
        return data

    monkeypatch.setattr(os, "preadv", counted_into)
    monkeypatch.setattr(os, "pread", counted)
    for expert in range(16):
        assert torch.equal(reader.read("x", (expert, 0, 0), (1, 32, 64))[0], experts[expert])
    print(f"{read} bytes read of {experts.numel() * 4}")
    assert read < 1.1 * experts.numel() * 4


def test_a_damaged_description_is_an_error(tmp_path: Path) -> None:
    writer = TorchDistWriter(tmp_path)
    writer.write("x", (3,), (0,), torch.randn(3))
    write_metadata(tmp_path, writer.finish())
    path = tmp_path / "__0_0.distcp"
    content = path.read_bytes()
    for damaged in (b"\0" * len(content), content[:-30] + b"\0" * 30, content.replace(b"data.pkl", b"data.pkk")):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="x is damaged"):
            TorchDistReader(tmp_path).read("x")


def test_a_box_is_read_in_another_dtype(tmp_path: Path) -> None:
    tensor = torch.randn(6, 8)
    tensor.numpy().tofile(tmp_path / "x")
    target = torch.zeros(6, 2, dtype=torch.bfloat16)
    with open(tmp_path / "x", "rb") as file:
        TensorPlace(0, (6, 8), torch.float32).read_box(file.fileno(), (slice(0, 6), slice(3, 5)), target)
    assert torch.equal(target, tensor[:, 3:5].bfloat16())


def test_large_boxes_are_used_where_they_lie(tmp_path: Path) -> None:
    """Mapped, not copied; what is written into them stays out of the file."""
    tensor = torch.randn(4, 200, 300)
    tensor.numpy().tofile(tmp_path / "x")
    place = TensorPlace(0, (4, 200, 300), torch.float32)
    with open(tmp_path / "x", "rb") as file:
        mapped = place.map_box(file.fileno(), (slice(1, 3), slice(0, 200), slice(0, 300)))
        assert mapped is not None
        assert torch.equal(mapped, tensor[1:3])
        mapped.zero_()
        columns = place.map_box(file.fileno(), (slice(0, 4), slice(0, 200), slice(0, 299)))
        assert columns is None, "not in one piece"
        small = place.map_box(file.fileno(), (slice(0, 1), slice(0, 3), slice(0, 300)))
        assert small is None, "cheaper to read"
        odd = TensorPlace(2, (4, 200, 299), torch.float32)
        assert odd.map_box(file.fileno(), (slice(0, 4), slice(0, 200), slice(0, 299))) is None, "not aligned"
        with pytest.raises(EOFError):
            TensorPlace(0, (5, 200, 300), torch.float32).map_box(
                file.fileno(), (slice(0, 5), slice(0, 200), slice(0, 300))
            )
        assert torch.equal(torch.from_file(str(tmp_path / "x"), size=tensor.numel()).view(4, 200, 300), tensor)
