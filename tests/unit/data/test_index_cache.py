"""Index caches when several runs build one, and when a killed one has left something."""

import os
import socket
import time
from pathlib import Path

import pytest

from megatron_ext.data.stream import index_cache
from megatron_ext.errors import DataError


def test_of_two_runs_that_build_the_same_index_one_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []

    def make(folder: str) -> None:
        built.append(folder)
        Path(folder, "a.npy").write_text(f"{len(built)}")
        if len(built) == 1:
            monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
            index_cache._build(tmp_path / "index-1", make)  # another run is done meanwhile

    for name, age in (("index-1.host.7.partial", 2 * index_cache._ABANDONED), ("index-1.host.8.partial", 0)):
        (tmp_path / name).mkdir(parents=True)
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    index_cache._build(tmp_path / "index-1", make)
    assert len(set(built)) == 2
    assert (tmp_path / "index-1" / "a.npy").read_text() == "2"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index-1", "index-1.host.8.partial"]


def test_an_order_that_no_memory_holds_is_one_message(tmp_path: Path) -> None:
    def make(folder: str) -> None:
        raise MemoryError("Unable to allocate 7.28 TiB")

    with pytest.raises(DataError, match=r"7\.28 TiB.*lower train\.train_iters"):
        index_cache._build(tmp_path / "index-1", make)
    assert not list(tmp_path.iterdir())
