"""Whole runs inside the processes of the pool, for tests that stop, kill and watch them."""

import contextlib
import json
import os
import random
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import torch.distributed as dist

from megatron_ext.config import load_run
from megatron_ext.errors import CheckpointError, MegatronExtError
from megatron_ext.runtime.device import choose_device
from megatron_ext.runtime.installation import installation
from megatron_ext.runtime.process_groups import split_process_group
from megatron_ext.training import loop
from megatron_ext.training import run_lock as module
from megatron_ext.training.data import RunData
from megatron_ext.training.run_lock import run_lock
from megatron_ext.training.same_everywhere import open_everywhere, require_same_code, require_same_run
from megatron_ext.training.session import Session
from megatron_ext.training.watch import watching
from tests.support.minimal_run import load, mapping
from tests.support.waiting import HANGS, wait_until

# What can be half done when a process dies: every one of these is a moment to be killed at.
_MOMENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.copyfile")


def train_here(path: Path, overrides: list[str]) -> int:
    """Run, or continue, the run at `path`; the signal that stopped it, or 0."""
    run = load_run(path, overrides)
    groups = split_process_group(run.parallel, run.runtime)
    layout, device = run.resolve(dist.get_world_size()), choose_device(run.runtime)
    with watching(run) as others, run_lock(run.checkpoint.directory):
        return loop.open_and_train(run, layout, groups, device, others)


def start_otherwise(folder: Path) -> list[str]:
    """What each rank says where the last one has other code, other values, other data, and none."""
    last = dist.get_rank() == dist.get_world_size() - 1
    data = {"tokenizer": "tok", "train": [{"path": str(folder / f"rank_{dist.get_rank()}" / "a")}]}  # paths may differ
    overrides = ["optimizer.lr=0.5"] if last else []
    fails: Any = lambda: open_data_of(("a", "b")) if not last else (folder / "c").read_text()  # noqa: E731
    checks = (
        partial(require_same_code, {"torch": "2.10.0" if last else "2.13.0"}),
        partial(require_same_run, load(mapping(data=data), *overrides)),
        partial(open_everywhere, partial(open_data_of, ("a", "other" if last else "b"))),
        partial(open_everywhere, fails, first_rank_first=True),
    )
    said = []
    for check in checks:
        try:
            check()
        except MegatronExtError as error:
            said.append(str(error) if error.is_everywhere else f"only here: {error}")
    require_same_run(load(mapping(data=data)))
    require_same_code(installation())
    assert open_everywhere(partial(open_data_of, ("a", "b"))).fingerprints == ("a", "b")
    return said


def open_data_of(fingerprints: tuple[str, ...]) -> RunData:
    """Data that nobody reads."""
    nothing: Any = contextlib.nullcontext()
    nothing.close = lambda: None
    return RunData(nothing, None, fingerprints, nothing)


def lock_own_disk(place: Path) -> str:
    """Take the lock of a directory that each rank has for itself, as on a node's own disk; why it is refused."""
    own = place / str(dist.get_rank())
    own.mkdir()
    with mock.patch.object(module, "_SEEN_WITHIN", 0.0), contextlib.chdir(own):
        try:
            with module.run_lock("run"):
                return ""
        except CheckpointError as error:
            return str(error)


def train_and_signal(path: Path, overrides: list[str], rank: int, number: int, metrics: Path, step: int) -> int:
    """Train; once step `step` is reported, `rank` sends itself a signal."""

    def send() -> None:
        wait_until(lambda: metrics.is_file() and metrics.read_text().count('"loss"') >= step)
        os.kill(os.getpid(), number)

    # Not ignored, as SIGINT is for what a shell starts with &; and one that comes when the run has ended ends nothing.
    before = signal.signal(number, lambda *_: None)
    sender = threading.Thread(target=send, daemon=True)
    if dist.get_rank() == rank:
        sender.start()
    try:
        return train_here(path, overrides)
    finally:
        if sender.ident is not None:
            sender.join()
        signal.signal(number, before)


def train_and_die(path: Path, overrides: list[str], directory: Path, moment: int) -> int:
    """Train; kill -9 before the operation number `moment` on a file of the run's directory."""
    seen = 0

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in _MOMENTS and str(arguments[0]).startswith(str(directory)):
            seen += 1
            if seen == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    train_here(path, overrides)
    return seen


def train_and_die_at(path: Path, overrides: list[str], rank: int, operation: str, below: str, file: str) -> None:
    """Train; `rank` is killed before its first `operation` on a file below `below` whose path goes on with `file`.

    Or, where `operation` is "validation", in the middle of the first one.
    """

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        if event == operation and str(arguments[0]).startswith(below) and f"/{file}" in str(arguments[0]):
            os.kill(os.getpid(), signal.SIGKILL)
        # Of the second place: whoever copies takes the newest checkpoint, so the next one comes after the kill.
        if file.startswith("second/") and event == "os.mkdir" and f"{below}/run/iter_0000006" in str(arguments[0]):
            time.sleep(HANGS)

    def count(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code is Session.validate.__code__:
            sys.setprofile(die)

    left = 300  # calls of a validation; it makes more than twice as many

    def die(frame: FrameType, event: str, _: Any) -> None:
        nonlocal left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

    if dist.get_rank() == rank:
        if operation == "validation":
            sys.setprofile(count)
        else:
            sys.addaudithook(look)
    train_here(path, overrides)


def moments(seed: int, count: int, last: int) -> list[int]:
    """`count` numbers from 1 to `last`, drawn with `seed`."""
    return sorted(random.Random(seed).sample(range(1, last + 1), count))


def losses(directory: Path) -> list[tuple[int, float]]:
    """Steps and losses as they stand in the file, also those that stand there twice."""
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [(record["iteration"], record["loss"]) for record in records if "loss" in record]
