"""Boxes of tensors read from files: right in every shape, and through a buffer that stays small."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.checkpoint import raw_io
from megatron_ext.checkpoint.raw_io import TensorPlace

START = 24
WHOLE = torch.arange(6 * 50 * 7, dtype=torch.float32).view(6, 50, 7)


@pytest.fixture(scope="module")
def descriptor(tmp_path_factory: pytest.TempPathFactory) -> int:
    file = tmp_path_factory.mktemp("raw") / "file"
    Path(file).write_bytes(bytes(START) + WHOLE.numpy().tobytes())
    return os.open(file, os.O_RDONLY)


def ranges(length: int) -> st.SearchStrategy[slice]:
    return st.tuples(st.integers(0, length), st.integers(0, length)).map(lambda ends: slice(*sorted(ends)))


@given(box=st.tuples(*map(ranges, WHOLE.shape)), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_a_box_is_read_in_small_pieces(box: tuple[slice, slice, slice], dtype: torch.dtype, descriptor: int) -> None:
    target = torch.full(WHOLE[box].shape, -1.0, dtype=dtype)
    read, buffers = raw_io.read_into, list[int]()

    def note(descriptor: int, start: int, into: torch.Tensor) -> None:
        if into.untyped_storage().data_ptr() != target.untyped_storage().data_ptr():
            buffers.append(into.numel() * into.itemsize)
        read(descriptor, start, into)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(raw_io, "_BUFFER", 128)
        patch.setattr(raw_io, "read_into", note)
        TensorPlace(START, tuple(WHOLE.shape), WHOLE.dtype).read_box(descriptor, box, target)
    assert torch.equal(target, WHOLE[box].to(dtype))
    assert max(buffers, default=0) <= 128
