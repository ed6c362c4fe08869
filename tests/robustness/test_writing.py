"""Writing files: full disks, folders of others, what a killed process left, links; nothing is lost or half there."""

import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_ext.data.indexed import write_synced
from megatron_ext.data.tokenizer import write_tokenizer
from megatron_ext.errors import ConversionError, DataError, MegatronExtError
from megatron_ext.files import OURS, output_place, publish_directory, start_directory, write_text
from megatron_ext.model_io.convert import convert
from tests.robustness.damage import read_all
from tests.unit.data.tokenizers import sentencepiece_model


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """As if the disk were full once a file has `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [100, 2000, 100_000])
@pytest.mark.parametrize(("source", "target"), [("megatron", "new-hf"), ("hf", "new-megatron")])
def test_a_full_disk_is_one_error_and_leaves_nothing(
    source: str, target: str, size: int, made: Path, tmp_path: Path
) -> None:
    with pytest.raises((MegatronExtError, OSError)) as caught, files_of_at_most(size):
        convert(made / source, tmp_path / target)
    if isinstance(caught.value, OSError):
        assert caught.value.filename is not None, "run_command names it"
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_is_named_and_the_old_one_kept(tmp_path: Path) -> None:
    write_text(tmp_path / "report.html", "old")
    with pytest.raises(OSError, match=r"report\.html"), files_of_at_most(10):
        write_text(tmp_path / "report.html", "x" * 100)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text() == "old"


@pytest.mark.parametrize("size", [100, 8000])  # in Python, and in Rust
def test_a_disk_that_is_full_while_a_tokenizer_is_written_is_named(size: int, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=f"{tmp_path}/t"), files_of_at_most(size):
        write_tokenizer(sentencepiece_model(), tmp_path / "t", [])
    with pytest.raises(OSError, match=r"plan\.json"), files_of_at_most(10):
        write_synced(tmp_path / "plan.json", b"x" * 100)
    assert not (tmp_path / "t").exists()
    assert not (tmp_path / "t.partial").exists()


def test_folders_of_others_are_never_removed(made: Path, tmp_path: Path) -> None:
    mine = tmp_path / "hf.partial"
    mine.mkdir()
    (mine / "thesis.txt").touch()
    with pytest.raises(ConversionError, match=r"hf\.partial is in the way"):
        convert(made / "megatron", tmp_path / "hf")
    assert (mine / "thesis.txt").exists()
    shutil.move(mine, tmp_path / "elsewhere")
    mine.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConversionError, match=r"hf\.partial is in the way"):
        convert(made / "megatron", tmp_path / "hf")
    assert (tmp_path / "elsewhere" / "thesis.txt").exists()
    mine.unlink()
    aside = tmp_path / "hf.old.partial"
    aside.mkdir()
    (aside / "thesis.txt").touch()
    convert(made / "megatron", tmp_path / "hf")
    with pytest.raises(ConversionError, match=r"hf\.old\.partial is in the way"):
        convert(made / "megatron", tmp_path / "hf", force=True)
    assert (aside / "thesis.txt").exists()
    read_all(tmp_path / "hf")


def test_what_a_killed_process_left_goes_and_what_came_meanwhile_stays(tmp_path: Path) -> None:
    target = output_place(tmp_path / "out", DataError, force=False, contents=("*.bin",))
    (start_directory(target) / "half.bin").touch()
    partial = start_directory(target)
    assert [path.name for path in partial.iterdir()] == [OURS]
    target.mkdir()
    (target / "of_another_process.bin").touch()
    with pytest.raises(FileExistsError, match="somebody else made it meanwhile"):
        publish_directory(partial, target, replace=False)
    publish_directory(partial, target, replace=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert list(target.iterdir()) == []


def test_a_file_is_never_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    beside = tmp_path / f".x.json.{os.getpid()}.partial"
    beside.symlink_to(tmp_path / "precious")
    write_text(tmp_path / "x.json", "{}")
    assert (tmp_path / "precious").read_text() == "mine"
    assert not beside.is_symlink()
