"""Files given to us are read with a clear error; output replaces only what it may."""

from pathlib import Path

import pytest

from megatron_ext.errors import DataError
from megatron_ext.files import check_output, publish_directory, read_json_object, write_text


@pytest.mark.parametrize(
    ("content", "complaint"),
    [("{broken", "cannot be read as JSON"), ("[1]", "expected a JSON object, found list"), (None, "No such file")],
)
def test_json_that_is_no_object_is_named(content: str | None, complaint: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "x.json").write_text(content)
    with pytest.raises(DataError, match=rf"x\.json: .*{complaint}"):
        read_json_object(tmp_path / "x.json", DataError)


def test_text_is_replaced_as_a_whole(tmp_path: Path) -> None:
    write_text(tmp_path / "deeper" / "x.txt", "old")
    write_text(tmp_path / "deeper" / "x.txt", "new")
    assert [p.read_text() for p in (tmp_path / "deeper").iterdir()] == ["new"]


def test_output_goes_over_its_own_kind_only(tmp_path: Path) -> None:
    target = tmp_path / "out"
    check_output(target, DataError, force=False, mark="mark.json")
    target.mkdir()
    with pytest.raises(DataError, match="exists; choose another place or pass --force"):
        check_output(target, DataError, force=False, mark="mark.json")
    check_output(target, DataError, force=True, mark="mark.json")
    (target / "thesis.txt").touch()
    with pytest.raises(DataError, match="is something else"):
        check_output(target, DataError, force=True, mark="mark.json")
    (target / "mark.json").touch()
    check_output(target, DataError, force=True, mark="mark.json", inputs=[tmp_path / "elsewhere"])
    for source in (target, target / "iter_0000001"):
        with pytest.raises(DataError, match="holds what is read"):
            check_output(target, DataError, force=True, mark="mark.json", inputs=[source])


def test_a_directory_takes_the_place_of_another(tmp_path: Path) -> None:
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    publish_directory(tmp_path / "new", tmp_path / "old")
    assert [p.name for p in tmp_path.rglob("*")] == ["old", "new"]
