"""Weights & Biases: runs are recorded and continued, and nothing that happens to it reaches training."""

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_ext.config import WandbConfig
from megatron_ext.monitoring.events import Event
from megatron_ext.monitoring.sinks import wandb_files
from megatron_ext.monitoring.sinks.wandb import WandbSink
from tests.support.commands import new_process
from tests.support.waiting import HANGS
from tests.unit.monitoring import wandb_client
from tests.unit.monitoring.wandb_server import WandbServer

NOWHERE = "http://127.0.0.1:9"


def report(
    directory: Path,
    mode: str,
    *arguments: str,
    url: str = NOWHERE,
    key: str = "0" * 40,
    dies: bool = False,
    seconds: int = 60,
) -> str:
    """Run the client, which has so many seconds to finish; return what it logged."""
    environment = {
        "WANDB_BASE_URL": url,
        "WANDB_API_KEY": key,
        "WANDB_MODE": "online",
        "WANDB__SERVICE_WAIT": str(HANGS),
        "NETRC": "/nonexistent",
        "HOME": str(directory),
    }
    process = new_process(
        *("-m", wandb_client.__name__, directory / "run", mode, str(seconds), *(arguments or ("1", "3"))),
        *["die"] * dies,
        **environment,
    )
    if dies:
        assert process.returncode == -signal.SIGKILL, process.stderr
        return process.stderr
    assert process.returncode == 0, process.stderr
    assert "training went on to its end" in process.stdout
    return process.stderr


def recorded(directory: Path) -> list[str]:
    return sorted(
        path.parent.name[: path.parent.name.index("run")]
        for path in directory.glob("run/wandb/*run-*-abcd1234/run-abcd1234.wandb")
    )


def rows(directory: Path) -> list[list[dict[str, Any]]]:
    """What the files of each start have of each step."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for path in sorted(directory.glob("run/wandb/*run-*-abcd1234/run-abcd1234.wandb"), key=os.path.getctime):
        records = [Record.FromString(one) for one in wandb_files._records(path.read_bytes(), 0)]
        history = [one.history for one in records if one.WhichOneof("record_type") == "history"]
        found.append([{item.key or "/".join(item.nested_key): item.value_json for item in one.item} for one in history])
    return found


def test_offline_no_step_is_lost_by_a_kill_and_none_is_there_twice(tmp_path: Path) -> None:
    report(tmp_path, "offline", "1", "4", dies=True)  # with all that W&B's own process holds
    said = report(tmp_path, "offline", "4", "6")
    assert "the steps 1 to 3 again" in said
    report(tmp_path, "offline", "6", "8")  # it has step 6
    again, last = rows(tmp_path)  # what was killed has nothing, and would keep `wandb sync` from sending the others
    assert [int(row["_step"]) for row in again] == [1, 2, 3, 4, 5, 6]
    assert [int(row["_step"]) for row in last] == [7, 8]
    assert [float(row["train/loss"]) for row in again[:3]] == [1.0, 0.5, 1 / 3]
    assert json.loads(again[0]["moe/load/layer_000/values"]) == [0.5, 0.5]
    assert recorded(tmp_path) == ["offline-"] * 2
    assert wandb_files.recorded_until(tmp_path / "run", "abcd1234") == 8


def test_online_no_step_is_lost_by_a_kill_and_none_is_there_twice(tmp_path: Path) -> None:
    server = WandbServer()
    report(tmp_path, "online", "1", "2", url=server.url)
    report(tmp_path, "online", "2", "4", url=server.url, dies=True)
    report(tmp_path, "online", "5", "5", url=server.url)
    server.go_away()
    assert set(server.started) == {"abcd1234"}
    assert [(line["_step"], line["train/loss"]) for line in server.history] == [(n, 1 / n) for n in range(1, 6)]
    late = [(line["_step"], line["evaluation/step"]) for line in server.history if "evaluation/score" in line]
    assert late == [(2, 1), (4, 2), (5, 5)]  # whatever step the run has come to
    told = [(alert["title"], alert["text"], alert["severity"]) for alert in server.alerts]
    assert told[0] == ("moe: skip", "step 1: a spike", "WARN")
    assert server.history[0]["moe/load/layer_000"]["values"] == [0.5, 0.5]


def test_without_credentials_it_goes_offline(tmp_path: Path) -> None:
    assert "set WANDB_API_KEY or run `wandb login`" in report(tmp_path, "online", key="")
    assert recorded(tmp_path) == ["offline-"]


def test_without_network_it_goes_offline(tmp_path: Path) -> None:
    said = report(tmp_path, "online")
    assert "could not start in mode online" in said
    assert recorded(tmp_path) == ["offline-"]
    # What to type once the network is back: the folder of this run.
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert f"send it later with: wandb sync {folder}" in said


def test_the_network_may_go_away_for_good(tmp_path: Path) -> None:
    server = WandbServer(only_start=True)
    said = report(tmp_path, "online", "1", "20", url=server.url, seconds=3)
    assert "wandb sync --include-online" in said  # an alert on its way keeps wandb from ending by itself
    assert server.started == ["abcd1234"]
    assert recorded(tmp_path) == [""]


def test_wandb_may_die(tmp_path: Path) -> None:
    said = report(tmp_path, "offline", "1", "20", "kill", seconds=3)
    # A thread of W&B's writes: on a busy machine its end is seen with the last report only.
    assert "W&B stopped taking reports" in said or "W&B could not finish" in said


def test_numbers_of_events_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[dict[str, Any], dict[str, Any]]] = []
    run = SimpleNamespace(
        log=lambda values, **how: drawn.append((values, how)), dir="unused", finish=lambda exit_code: None
    )
    monkeypatch.setattr("megatron_ext.monitoring.sinks.wandb._start", lambda *_: run)
    sinks = [
        WandbSink(WandbConfig(mode="offline"), "id", tmp_path, {}, tmp_path / "metrics.jsonl", 3) for _ in range(2)
    ]
    for sink, failed in zip(sinks, (False, True), strict=True):
        sink.event(Event("skip", 3, "a skip"))
        sink.event(Event("gradients", 4, "gradients", {"gradients": {"layer_000": {"mlp": {"norm": 0.5}}}}))
        sink.event(Event("evaluation", 2, "late", {"results": {"score": 0.5}}))
        sink.close(failed=failed)  # a row of which more was to come waits for the run to go on
    row = {"gradients/norm/layer_000/mlp": 0.5, "evaluation/score": 0.5, "evaluation/step": 2}
    assert drawn == [(row, {"step": 4, "commit": True})]
