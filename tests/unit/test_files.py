"""Files given to us are read with a clear error; output replaces only what it may."""

import os
from pathlib import Path

import pytest

from megatron_ext.errors import DataError
from megatron_ext.files import OURS, output_place, publish_directory, read_json_object, require_writable, write_text
from megatron_ext.foreign import reading


@pytest.mark.parametrize(
    ("content", "complaint"),
    [("{broken", "cannot be read as JSON"), ("[1]", "expected a JSON object, found list"), (None, "No such file")],
)
def test_json_that_is_no_object_is_named(content: str | None, complaint: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "x.json").write_text(content)
    with pytest.raises(DataError, match=rf"x\.json: .*{complaint}"):
        read_json_object(tmp_path / "x.json", DataError)


def test_json_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": 1}', encoding="utf-8-sig")
    assert read_json_object(tmp_path / "x.json", DataError) == {"a": 1}


def test_json_without_an_end_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "device.json").symlink_to("/dev/zero")
    for name in ("pipe.json", "device.json"):
        with pytest.raises(DataError, match=rf"{name}: is not a regular file"):
            read_json_object(tmp_path / name, DataError)
    with open(tmp_path / "sparse.json", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DataError, match=r"sparse\.json: cannot be read as JSON \(it has 1,099,511,627,776 bytes"):
        read_json_object(tmp_path / "sparse.json", DataError)


def test_text_is_replaced_as_a_whole(tmp_path: Path) -> None:
    write_text(tmp_path / "deeper" / "x.txt", "old")
    write_text(tmp_path / "deeper" / "x.txt", "new")
    assert [p.read_text() for p in (tmp_path / "deeper").iterdir()] == ["new"]


CONTENTS = ("mark.json", "*.bin")


def place(target: Path, *, force: bool = True, inputs: tuple[Path, ...] = ()) -> Path:
    return output_place(target, DataError, force=force, contents=CONTENTS, inputs=inputs)


def test_output_goes_over_its_own_kind_only(tmp_path: Path) -> None:
    target = tmp_path / "out"
    assert place(target, force=False) == target
    target.mkdir()
    with pytest.raises(DataError, match="exists; choose another place or pass --force"):
        place(target, force=False)
    assert place(target) == target
    (target / "a.bin").touch()
    with pytest.raises(DataError, match=r"something else \(it has no mark.json\)"):
        place(target)
    (target / "mark.json").touch()
    assert place(target, inputs=(tmp_path / "elsewhere",)) == target
    for source in (target, target / "iter_0000001"):
        with pytest.raises(DataError, match="holds what is read"):
            place(target, inputs=(source,))
    (target / "thesis.txt").touch()
    with pytest.raises(DataError, match=r"something else \(it holds thesis.txt\): not replaced, even with --force"):
        place(target)


def test_a_link_is_followed_and_kept(tmp_path: Path) -> None:
    real, link = tmp_path / "disk" / "real", tmp_path / "link"
    real.mkdir(parents=True)
    (real / "mark.json").write_text("old")
    link.symlink_to(real)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "mark.json").write_text("new")
    publish_directory(tmp_path / "new", place(link))
    assert link.is_symlink()
    assert (real / "mark.json").read_text() == "new"


def test_a_directory_takes_the_place_of_another(tmp_path: Path) -> None:
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    publish_directory(tmp_path / "new", tmp_path / "old")
    assert [p.name for p in tmp_path.rglob("*")] == ["old", "new"]


def test_what_was_set_aside_goes_with_the_next_publication(tmp_path: Path) -> None:
    """Of a process that was killed when the old directory had lost its name and the new one had none yet."""
    for name in ("new", "d.old.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    (tmp_path / "d.old.partial" / OURS).touch()
    publish_directory(tmp_path / "new", tmp_path / "d")
    assert [p.name for p in tmp_path.rglob("*")] == ["d", "new"]


def test_what_cannot_be_written_is_found_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    require_writable(tmp_path / "a")
    require_writable(tmp_path / "new" / "b")
    assert (tmp_path / "a").read_text() == "old"
    assert list((tmp_path / "new").iterdir()) == []
    for place in (tmp_path / "a" / "b", tmp_path / "new", Path("/proc/b")):
        with pytest.raises(OSError, match=r".") as refusal:
            require_writable(place)
        assert refusal.value.filename


@pytest.mark.parametrize("kind", ["JSON", "safetensors"])
def test_a_git_lfs_pointer_is_named(kind: str, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    expected = pytest.raises(
        DataError, match="f: is a Git LFS pointer, not the file itself; fetch it by 'git lfs pull'"
    )
    with expected, reading(tmp_path / "f", DataError, kind=kind):
        raise ValueError("what a parser says")
