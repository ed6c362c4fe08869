"""Compiled code on the disk: damaged, half written or of another source, it costs time and nothing else."""

import errno
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("numba")

from numba import config
from numba.core.caching import IndexDataCacheFile

from megatron_ext.data.prepare.compiled_paths import _compiled


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path / "kept"))
    return tmp_path / "kept"


def _plus(directory: Path, number: int) -> Any:
    """A function of a new process that adds `number`, at the same place in the same file as those before."""
    path = directory / "source.py"
    path.write_text(f"def plus(x):\n    return x + {number}\n")
    scope: dict[str, Any] = {"__name__": "source"}
    exec(compile(path.read_text(), path, "exec"), scope)
    return _compiled(scope["plus"])


@pytest.mark.parametrize("ending", ["nbi", "nbc"])
def test_a_file_cut_short_is_written_anew(kept: Path, tmp_path: Path, ending: str) -> None:
    assert _plus(tmp_path, 1)(1) == 2
    for path in kept.rglob(f"*.{ending}"):
        path.write_bytes(path.read_bytes()[:9])
    hits = []
    for _ in range(2):
        function = _plus(tmp_path, 1)
        assert function(1) == 2
        hits.append(sum(function.stats.cache_hits.values()))
    assert hits == [0, 1]


def test_full_disk_leaves_no_code_of_an_older_source(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    assert _plus(tmp_path, 1)(1) == 2
    with monkeypatch.context() as patch:
        patch.setattr(IndexDataCacheFile, "_save_data", full)
        assert _plus(tmp_path, 5)(1) == 6
    assert not [path for path in kept.rglob("*") if path.is_file()]
    assert _plus(tmp_path, 5)(1) == 6


def test_killed_between_list_and_code(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class KilledError(BaseException): ...

    def killed(*_: Any) -> None:
        raise KilledError

    assert _plus(tmp_path, 1)(1) == 2
    with monkeypatch.context() as patch:
        patch.setattr(IndexDataCacheFile, "_save_data", killed)
        with pytest.raises(KilledError):
            _plus(tmp_path, 5)(1)
    assert [path.suffix for path in kept.rglob("*") if path.is_file()] == [".nbi"]
    assert _plus(tmp_path, 5)(1) == 6
