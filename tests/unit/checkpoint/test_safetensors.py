"""Hugging Face directories as streams: safetensors reads what we write; failures leave nothing behind."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ext.checkpoint.hf_directory import INDEX_FILE, HuggingFaceSink, HuggingFaceSource
from megatron_ext.checkpoint.streams import TensorSpec
from megatron_ext.errors import ConversionError

TENSORS = {
    "a": torch.randn(5, 3),
    "b": torch.randn(7).bfloat16(),
    "c": torch.arange(6).view(2, 3),
    "d": torch.tensor(2.5),
}
SPECS = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in TENSORS.items()}


def test_library_reads_what_we_write_in_any_order(tmp_path: Path) -> None:
    with HuggingFaceSink(tmp_path / "out", SPECS) as sink:
        for name in reversed(TENSORS):
            sink.write(name, TENSORS[name])
    loaded = load_file(tmp_path / "out" / "model.safetensors")
    assert all(
        torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype for name, tensor in TENSORS.items()
    )


def test_shards_have_an_index_and_are_read_back(tmp_path: Path) -> None:
    with HuggingFaceSink(tmp_path / "out", SPECS, shard_bytes=64) as sink:
        for name, tensor in TENSORS.items():
            sink.write(name, tensor)
    index = json.loads((tmp_path / "out" / INDEX_FILE).read_text())
    assert len(set(index["weight_map"].values())) == 3
    assert index["metadata"]["total_size"] == sum(t.numel() * t.itemsize for t in TENSORS.values())
    source = HuggingFaceSource(tmp_path / "out")
    assert source.specs == SPECS
    assert all(torch.equal(source.read(name), tensor) for name, tensor in TENSORS.items())


def test_single_files_of_others_are_read(tmp_path: Path) -> None:
    save_file({"x": torch.ones(3)}, tmp_path / "model.safetensors")
    assert HuggingFaceSource(tmp_path).specs == {"x": TensorSpec((3,), torch.float32)}


def test_an_index_that_names_absent_tensors_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.ones(3)}, tmp_path / "one.safetensors")
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"x": "one.safetensors", "y": "one.safetensors"}}))
    with pytest.raises(ConversionError, match="no shard holds: y"):
        HuggingFaceSource(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.ones(3), "y": torch.ones(1)}, tmp_path / "one.safetensors")
    save_file({"x": torch.zeros(3), "z": torch.ones(1)}, tmp_path / "two.safetensors")
    weight_map = {"x": "one.safetensors", "y": "one.safetensors", "z": "two.safetensors"}
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ConversionError, match=r"x is in both one\.safetensors and two\.safetensors"):
        HuggingFaceSource(tmp_path)


def test_one_file_beside_an_index_is_refused(tmp_path: Path) -> None:
    save_file({"x": torch.ones(3)}, tmp_path / "one.safetensors")
    save_file({"x": torch.zeros(3)}, tmp_path / "model.safetensors")
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"x": "one.safetensors"}}))
    with pytest.raises(ConversionError, match=r"has both model\.safetensors and .*; move the one"):
        HuggingFaceSource(tmp_path)


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ConversionError, match=r"model\.safetensors"):
        HuggingFaceSource(tmp_path)


@pytest.mark.parametrize(
    ("name", "tensor", "expected"),
    [
        ("z", torch.zeros(1), "z: not part of the target"),
        ("a", torch.zeros(3, 5), r"a: is \[3, 5\], the target has \[5, 3\]"),
    ],
)
def test_wrong_writes_leave_nothing(tmp_path: Path, name: str, tensor: torch.Tensor, expected: str) -> None:
    with pytest.raises(ConversionError, match=expected), HuggingFaceSink(tmp_path / "out", SPECS) as sink:
        sink.write(name, tensor)
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_too_few_leaves_nothing(tmp_path: Path) -> None:
    complaint = pytest.raises(ConversionError, match="3 tensors of the target were never written: b, c, d")
    with complaint, HuggingFaceSink(tmp_path / "out", SPECS) as sink:
        sink.write("a", TENSORS["a"])
    assert list(tmp_path.iterdir()) == []


def test_an_existing_target_is_kept_unless_forced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_text("old")
    (out / "precious").touch()
    with pytest.raises(ConversionError, match="exists; choose another place or pass --force"):
        HuggingFaceSink(out, SPECS)
    with pytest.raises(ConversionError, match=r"something else \(it holds precious\): not replaced"):
        HuggingFaceSink(out, SPECS, force=True)
    (out / "precious").unlink()
    with pytest.raises(ConversionError, match="holds what is read"):
        HuggingFaceSink(out, SPECS, force=True, inputs=[out / "iter_0000001"])
    with HuggingFaceSink(out, SPECS, force=True) as sink:
        assert (out / "model.safetensors").read_text() == "old", "replaced only when the new one is complete"
        for name, tensor in TENSORS.items():
            sink.write(name, tensor)
    assert set(HuggingFaceSource(out).specs) == set(SPECS)
