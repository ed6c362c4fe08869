"""Two processes never write one directory: the second is told who the first is; the dead hold nothing."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_ext import locks
from megatron_ext.errors import MegatronExtError
from megatron_ext.locks import LOCK_FILE, exclusive, exclusive_output, joined
from tests.support.lock_holder import holder


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_PATIENCE", 0.0)


@pytest.mark.parametrize("lock", ["exclusive", "exclusive_output"])
def test_a_second_writer_is_told_who_the_first_is_and_the_dead_hold_nothing(lock: str, tmp_path: Path) -> None:
    take, target = getattr(locks, lock), tmp_path / "new" / "out"
    with holder(target, lock) as other:
        with pytest.raises(MegatronExtError) as refusal, take(target, "testing"):
            pass
        for part in (
            str(target),
            "testing",
            socket.gethostname(),
            f"process {other.pid}",
            "since 20",
            "choose another",
        ):
            assert part in str(refusal.value)
        other.kill()
        other.wait()
        with take(target, "testing"):
            pass
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_within_a_process_it_may_be_taken_again_through_any_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with exclusive_output(tmp_path / "real", "testing"):
        with exclusive_output(tmp_path / "link", "testing"):
            pass
        assert (tmp_path / ".real.lock").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"link"}


def test_it_is_held_as_long_as_one_of_those_who_share_it_lives(tmp_path: Path) -> None:
    with holder(tmp_path, share=True) as owner, holder(tmp_path, "joined"):
        owner.kill()
        owner.wait()
        with pytest.raises(MegatronExtError, match=f"process {owner.pid}"), exclusive(tmp_path, "testing"):
            pass
    with exclusive(tmp_path, "testing") as lock:
        lock.share()
        with pytest.raises(MegatronExtError, match=f"process {os.getpid()}"):
            locks.DirectoryLock(tmp_path, tmp_path / LOCK_FILE, "testing").acquire()
        with holder(tmp_path, "joined"):
            pass
    assert not list(tmp_path.iterdir())


def test_a_process_forked_from_the_owner_holds_nothing(tmp_path: Path) -> None:
    with exclusive(tmp_path, "testing"):
        code = f"""
import os, time
from megatron_ext.locks import exclusive
with exclusive({str(tmp_path / "forked")!r}, "testing"):
    read, write = os.pipe()
    if not os.fork():
        os.write(write, b"!")
        time.sleep(5)
        os._exit(0)
    os.read(read, 1)
    os.kill(os.getpid(), 9)
"""
        subprocess.run([sys.executable, "-c", code], check=False)
        with exclusive(tmp_path / "forked", "testing"):
            pass


@pytest.mark.parametrize(
    ("owner", "job", "is_refused"),
    [
        ({"host": "elsewhere", "boot": "other"}, None, True),
        ({"host": "elsewhere", "boot": "other", "job": "slurm  7"}, "8", True),
        ({"host": "elsewhere", "boot": "other", "job": "slurm  7"}, "7", False),
        ({"host": socket.gethostname(), "boot": "before this one"}, None, False),
        ({"host": "container before", "boot": locks._boot()}, None, False),
    ],
    ids=["other host", "other job", "same job", "before a reboot", "other container"],
)
def test_an_owner_whose_lock_the_kernel_does_not_show(
    owner: dict[str, Any], job: str | None, is_refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_CLUSTER_NAME", "SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    if job is not None:
        monkeypatch.setenv("SLURM_JOB_ID", job)
    file = tmp_path / LOCK_FILE
    file.write_text(json.dumps({"purpose": "training", "pid": 5, "since": "then", "command": "train", **owner}))
    if not is_refused:
        with exclusive(tmp_path, "testing"):
            pass
        return
    way_out = f"on elsewhere.*\n.*remove {file} and start again"
    with pytest.raises(MegatronExtError, match=way_out), exclusive(tmp_path, "testing"):
        pass
    assert file.is_file()


def test_a_copied_lock_file_is_no_lock(tmp_path: Path) -> None:
    owner = {"host": "elsewhere", "boot": "other", "pid": 5, "inode": tmp_path.stat().st_ino}
    (tmp_path / LOCK_FILE).write_text(json.dumps(owner))
    with exclusive(tmp_path, "testing"):
        pass


@pytest.mark.parametrize(
    ("answer", "is_over"),
    [
        ("exit 0", True),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", True),
        ("echo RUNNING", False),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", False),
    ],
    ids=["ended", "forgotten", "running", "no answer"],
)
def test_slurm_is_asked_about_an_owner_of_another_job(
    answer: str, is_over: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    squeue = tmp_path / "bin" / "squeue"
    squeue.parent.mkdir()
    squeue.write_text(f'#!/bin/sh\ntest "$2" = --jobs=7 || exit 9\n{answer}\n')
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{squeue.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "big")
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    (tmp_path / LOCK_FILE).write_text(json.dumps({"host": "elsewhere", "boot": "other", "job": "slurm big 7"}))
    refusal = contextlib.nullcontext() if is_over else pytest.raises(MegatronExtError, match="start again")
    with refusal, exclusive(tmp_path, "testing"):
        pass


@pytest.mark.parametrize("content", [b"", b"\0\xff\xff", b"[1]", b"{}", b'{"pid": "x"}'])
def test_a_lock_file_of_any_content_is_no_obstacle(content: bytes, tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).write_bytes(content)
    if b"pid" in content:  # somebody, who cannot be told apart from somebody elsewhere
        with pytest.raises(MegatronExtError, match="start again"), exclusive(tmp_path, "testing"):
            pass
        return
    with exclusive(tmp_path, "testing"), joined(tmp_path / "other", "testing"):
        pass
