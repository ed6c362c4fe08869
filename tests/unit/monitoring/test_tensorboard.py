"""TensorBoard's event files, read back: every figure, and after a resume no step twice."""

import logging
import resource
import signal
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.errors import EnvironmentFault
from megatron_ext.mcore.moe.metrics import LayerHealth
from megatron_ext.monitoring.clock import Clock
from megatron_ext.monitoring.events import Event
from megatron_ext.monitoring.monitor import Monitor, StepReport
from megatron_ext.monitoring.sinks.tensorboard import require_tensorboard
from megatron_ext.monitoring.sources import SourceReport, ValidationReport
from tests.support.minimal_run import load, mapping
from tests.unit.training.plans import plan_of_run


def test_without_the_library_one_line_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorboardX", None)
    with pytest.raises(EnvironmentFault, match=r"needs tensorboardX: pip install tensorboardX \(or megatron-ext\["):
        require_tensorboard()


def monitor(directory: Path, iteration: int = 0) -> Monitor:
    run = load(
        mapping(checkpoint={"directory": str(directory)}, logging={"tensorboard_directory": str(directory / "tb")})
    )
    return Monitor(run, run.resolve(1), plan_of_run(run), iteration, "abcd1234", Clock())


def report(iteration: int, loss: float) -> StepReport:
    layer = LayerHealth([0.5, 0.25, 0.25], 0.0, 0.9, 0.5, 2.0, {"aux_loss": 1.1})
    sources = {"ja": SourceReport(loss, 10.0, 640, 0.5), "masked": SourceReport(None, 0.0, 64, 0.1)}
    parts = {"data": 0.5, "forward_backward": 1.5}
    return StepReport(
        iteration, {"loss": loss}, 1e-3, 0.7, 8, 2**20, {1: layer}, sources, 1, "first", {}, parts, {"lag": 2}
    )


def read(directory: Path) -> tuple[dict[tuple[str, int], Any], list[Any]]:
    """Values by tag and step as TensorBoard shows them, and all records."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    records: list[Any] = []
    for path in sorted(directory.glob("events.out.tfevents.*")):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            records.append(event_pb2.Event.FromString(content[at + 12 : at + 12 + length]))
            at += 16 + length
    shown: dict[tuple[str, int], Any] = {}
    for record in records:
        if record.HasField("session_log") and record.session_log.status == event_pb2.SessionLog.START:
            shown = {key: value for key, value in shown.items() if key[1] < record.step}
        for value in record.summary.value:
            assert (value.tag, record.step) not in shown
            shown[value.tag, record.step] = value
    return shown, records


def test_everything_is_there_and_a_resumed_run_shows_no_step_twice(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    first = monitor(tmp_path)
    for step in (1, 2, 3):
        first.step(report(step, step / 2))
    first.validation(3, ValidationReport(0.0, {"ja": 0.0}))
    first.event(Event("skip", 3, "a spike"))
    # Killed: nothing is closed. It goes on from step 2.
    second = monitor(tmp_path, 2)
    for step in (3, 4):
        second.step(report(step, 10.0 + step))
    second.close()
    shown, records = read(tmp_path / "tb")
    assert [shown["train/loss", step].simple_value for step in (1, 2, 3, 4)] == [0.5, 1.0, 13.0, 14.0]
    assert ("validation/loss", 3) not in shown
    assert shown["throughput/memory_bytes", 4].simple_value == 2**20
    assert [shown[f"step_seconds/{part}", 4].simple_value for part in ("data", "forward_backward")] == [0.5, 1.5]
    assert shown["run/lag", 1].simple_value == 2
    assert shown["sources/loss/ja", 4].simple_value == 14
    assert ("sources/loss/masked", 4) not in shown
    load_of_experts = shown["moe/load/layer_001", 4].histo
    assert (list(load_of_experts.bucket), list(load_of_experts.bucket_limit)) == ([0.5, 0.25, 0.25], [1, 2, 3])
    assert shown["stage/text_summary", 1].tensor.string_val == [b"first"]
    assert b"learning" not in shown["run/text_summary", 0].tensor.string_val[0]
    assert b"train_iters: 100" in shown["run/text_summary", 0].tensor.string_val[0]
    texts = [
        value.tensor.string_val[0]
        for r in records
        for value in r.summary.value
        if value.tag == "events/skip/text_summary"
    ]
    assert texts == [b"a spike"]


def test_a_full_disk_costs_reports_and_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("tensorboardX")
    caplog.set_level(logging.WARNING)
    sinks = monitor(tmp_path)
    (path,) = (tmp_path / "tb").iterdir()
    sinks.step(report(1, 1.0))
    limits, before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, limits[1]))
        for step in (2, 3):
            sinks.step(replace(report(step, 1.0), experts=None))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    sinks.close()
    assert [message for message in caplog.messages if "TensorBoard" in message] == [
        "TensorBoard's files take no more reports: it takes only a part of a record; everything is in the metrics file"
    ]
    shown, _ = read(tmp_path / "tb")
    assert {step for tag, step in shown if tag == "train/loss"} == {1}
