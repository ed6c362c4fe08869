"""The torch_dist format: our reader and writer against each other, against torch's, and against damage."""

import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.checkpoint import raw_io
from megatron_ext.checkpoint.shards import shards_of_range
from megatron_ext.checkpoint.torch_dist import METADATA_FILE, TorchDistReader, TorchDistWriter, write_metadata
from megatron_ext.errors import CheckpointError


def write(directory: Path, tensors: dict[str, torch.Tensor], cuts: tuple[int, ...] = ()) -> None:
    """Write `tensors`, each cut at the flat positions `cuts` into chunks of two files."""
    writers = [TorchDistWriter(directory, f"__{n}_0.distcp") for n in range(2)]
    for key, tensor in tensors.items():
        bounds = [0, *(cut for cut in cuts if cut < tensor.numel()), tensor.numel()]
        for number, (start, stop) in enumerate(zip(bounds, bounds[1:], strict=False)):
            for offset, size in shards_of_range(tuple(tensor.shape), start, stop):
                part = tensor[tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))]
                writers[number % 2].write(key, tuple(tensor.shape), offset, part)
    write_metadata(directory, [record for writer in writers for record in writer.finish()])


@settings(max_examples=30)
@given(data=st.data())
def test_any_box_can_be_read_from_any_chunks(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("checkpoint")
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple))
    tensor = torch.randn(shape)
    write(directory, {"x": tensor}, tuple(sorted(data.draw(st.sets(st.integers(1, 30), max_size=4)))))
    offset = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    size = tuple(data.draw(st.integers(1, n - o)) for n, o in zip(shape, offset, strict=True))
    expected = tensor[tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))]
    assert torch.equal(TorchDistReader(directory).read("x", offset, size), expected)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(raw_io, "_MAPPED_FROM", 1)  # as if all of it were large
        assert torch.equal(TorchDistReader(directory).read("x", offset, size), expected)


def test_torch_reads_what_we_write(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(6, 4), "b": torch.randn(3, 5).bfloat16()}
    write(tmp_path, tensors, cuts=(5, 9))
    loaded = {key: torch.zeros_like(tensor) for key, tensor in tensors.items()}
    dcp.load(loaded, checkpoint_id=str(tmp_path), no_dist=True)
    assert all(torch.equal(loaded[key], tensors[key]) for key in tensors)


def test_we_read_what_torch_writes(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(6, 4), "b": torch.arange(7)}
    dcp.save(tensors, checkpoint_id=str(tmp_path), no_dist=True)
    reader = TorchDistReader(tmp_path)
    assert all(torch.equal(reader.read(key), tensors[key]) for key in tensors)
    assert reader.dtype("b") is torch.int64


def test_reading_converts_dtype(tmp_path: Path) -> None:
    write(tmp_path, {"x": torch.randn(4)})
    target = torch.zeros(4, dtype=torch.bfloat16)
    TorchDistReader(tmp_path).read_into("x", (0,), target)
    assert torch.equal(target, TorchDistReader(tmp_path).read("x").bfloat16())


def test_views_do_not_drag_their_storage_along(tmp_path: Path) -> None:
    big = torch.randn(1000, 100)
    writer = TorchDistWriter(tmp_path)
    writer.write("x", (1, 100), (0, 0), big[:1])
    assert writer.finish()[0].length < 5000


def test_incomplete_tensors_are_refused_when_written(tmp_path: Path) -> None:
    writer = TorchDistWriter(tmp_path)
    writer.write("x", (4,), (0,), torch.zeros(3))
    with pytest.raises(CheckpointError, match="chunks of x hold 3 of 4 elements"):
        write_metadata(tmp_path, writer.finish())


def test_a_truncated_file_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, {"x": torch.randn(50)})
    path = tmp_path / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp ends inside x"):
        TorchDistReader(tmp_path).read("x")


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, {"x": torch.randn(5)})
    (tmp_path / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: No such file"):
        TorchDistReader(tmp_path).read("x")


def test_no_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no torch_dist checkpoint"):
        TorchDistReader(tmp_path)


class Evil:
    """Runs code when unpickled by a naive reader."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.system, ("echo unpickled code ran > /dev/stderr",)


def through_a_trusted_module() -> bytes:
    """A pickle that reaches os.system by a dotted name in a module whose classes metadata is made of."""

    def text(word: str) -> bytes:
        return pickle.SHORT_BINUNICODE + bytes([len(word)]) + word.encode()

    function = text("torch.distributed.checkpoint.filesystem") + text("os.system") + pickle.STACK_GLOBAL
    call = text("echo unpickled code ran > /dev/stderr") + pickle.TUPLE1 + pickle.REDUCE
    return pickle.PROTO + b"\x04" + function + call + pickle.STOP


@pytest.mark.parametrize(
    ("content", "asked_for"),
    [
        (pickle.dumps(Evil()), "posix.system"),
        (through_a_trusted_module(), "torch.distributed.checkpoint.filesystem.os.system"),
    ],
    ids=["plain", "dotted"],
)
def test_foreign_classes_are_not_unpickled(
    content: bytes, asked_for: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / METADATA_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"refused, it asks for {asked_for}"):
        TorchDistReader(tmp_path)
    assert "ran" not in capfd.readouterr().err


def test_the_dotted_pickle_would_run_code(capfd: pytest.CaptureFixture[str]) -> None:
    """It is what it says: a naive reader runs it."""
    pickle.loads(through_a_trusted_module())
    assert "unpickled code ran" in capfd.readouterr().err


def test_damaged_metadata_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, {"x": torch.randn(5)})
    metadata = tmp_path / METADATA_FILE
    metadata.write_bytes(metadata.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match="cannot be read"):
        TorchDistReader(tmp_path)
