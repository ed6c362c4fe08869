"""Manifests: sums of files written in any order, and what they say of damaged directories."""

import random
import zlib
from pathlib import Path

import pytest

from megatron_ext.errors import DataError
from megatron_ext.manifest import MANIFEST_FILE, FileSum, RunningSum, check_manifest, joined, write_manifest


def test_sums_of_pieces_in_any_order_are_those_of_the_file() -> None:
    generator = random.Random(0)
    for _ in range(50):
        whole, pieces = b"", []
        for _ in range(generator.randint(1, 6)):
            whole += bytes(generator.choice([0, 0, 7, 70_000]))
            piece = generator.randbytes(generator.randint(1, 3000))
            pieces.append((len(whole), piece))
            whole += piece
        generator.shuffle(pieces)
        running = RunningSum()
        for start, piece in pieces:
            running.add(start, piece)
        assert running.sum() == FileSum(len(whole), zlib.crc32(whole))


def test_a_hole_of_many_blocks() -> None:
    running = RunningSum()
    running.add(9_000_001, b"end")
    assert running.sum() == FileSum(9_000_004, zlib.crc32(bytes(9_000_001) + b"end"))
    assert joined(FileSum(0, 0), FileSum(3, zlib.crc32(b"end"))) == FileSum(3, zlib.crc32(b"end"))


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    directory = tmp_path / "made"
    (directory / "inner").mkdir(parents=True)
    (directory / "weights").write_bytes(bytes(range(256)))
    (directory / "inner" / "empty").touch()
    write_manifest(directory)
    return directory


def test_what_was_written_passes(finished: Path) -> None:
    assert check_manifest(finished, DataError, checksums=True)


def test_a_directory_without_a_manifest_passes(finished: Path) -> None:
    (finished / MANIFEST_FILE).unlink()
    assert not check_manifest(finished, DataError, checksums=True)
    (finished / MANIFEST_FILE).write_text('{"name": "a web application"}')
    assert not check_manifest(finished, DataError, checksums=True)


def test_sizes_are_always_compared(finished: Path) -> None:
    (finished / "weights").write_bytes(b"short")
    (finished / "inner" / "empty").unlink()
    with pytest.raises(DataError, match=r"(?s)weights: 5 bytes instead of 256.*|inner/empty: No such file"):
        check_manifest(finished, DataError)
    assert check_manifest(finished, DataError, only=("nothing",))


def test_checksums_find_a_flipped_bit(finished: Path) -> None:
    (finished / "weights").write_bytes(bytes([*range(255), 254]))
    assert check_manifest(finished, DataError)
    with pytest.raises(DataError, match="weights: the right size, but other content"):
        check_manifest(finished, DataError, checksums=True)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "inner/../../outside", r"a\u0000b", r"\ud800"])
def test_a_manifest_names_nothing_outside_and_nothing_that_no_file_is_called(finished: Path, name: str) -> None:
    path = finished / MANIFEST_FILE
    path.write_text(path.read_text().replace("inner/empty", name))
    with pytest.raises(DataError, match=r"manifest\.json: damaged at '"):
        check_manifest(finished, DataError)


def test_a_cut_manifest_is_never_taken_for_none(finished: Path) -> None:
    path = finished / MANIFEST_FILE
    text = path.read_text()
    for length in range(len(text) - 1):
        path.write_text(text[:length])
        with pytest.raises(DataError):
            check_manifest(finished, DataError)
