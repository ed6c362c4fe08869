"""Starts, feeds and ends a W&B run as training does, in a process of its own: wandb reads its environment only once.

Arguments: directory, mode, seconds that it may take to finish, first step, last step, and `kill` to end wandb's service
process after the start, or `die` to end both by kill -9 where another would close the run: the service holds all then.
"""

import contextlib
import logging
import os
import signal
import sys
from pathlib import Path

import psutil

from megatron_ext.config import WandbConfig
from megatron_ext.monitoring.alerts.message import Message
from megatron_ext.monitoring.events import Event
from megatron_ext.monitoring.metrics_file import METRICS_FILE, MetricsFile
from megatron_ext.monitoring.sinks import wandb as wandb_sink
from megatron_ext.monitoring.sinks.wandb import WandbSink
from megatron_ext.monitoring.step_report import step_panels_of


def main(directory: str, mode: str, seconds: str, first: str, last: str, kill: str = "") -> None:
    logging.basicConfig(level=logging.INFO)
    wandb_sink._FINISH_SECONDS = wandb_sink._FINISH_MARGIN_SECONDS = int(seconds)
    path, begin = Path(directory) / METRICS_FILE, int(first) - 1
    metrics = MetricsFile(path, begin)
    run = WandbSink(WandbConfig(mode=mode), "abcd1234", Path(directory), {"model": {"num_layers": 4}}, path, begin)
    metrics.write({"event": "start", "iteration": begin, "run": {"logging": {"wandb": {"mode": mode}}}})
    service = [p for p in psutil.Process().children(recursive=True) if p.name().startswith("wandb")]
    assert service or not kill
    for process in service:
        if kill == "kill":
            process.kill()
        elif kill == "die":
            process.suspend()  # or it writes what it holds when this process, under load, takes long
    for step in range(int(first), int(last) + 1):
        values = {"iteration": step, "loss": 1.0 / step, "learning_rate": 1.0, "moe": {"0": {"load": [0.5, 0.5]}}}
        metrics.write(values)
        run.log(step_panels_of(values), step)
    evaluated = Event("evaluation", int(first), "late", {"results": {"score": 0.5}})
    metrics.write(evaluated.record())
    run.event(evaluated)
    with contextlib.suppress(ConnectionError):  # after its death; whoever sends keeps it then
        run.send(Message("moe: skip", "step 1: a spike", "warning"))
    if kill == "die":
        for process in service:
            process.kill()
        os.kill(os.getpid(), signal.SIGKILL)
    run.close()
    print("training went on to its end")


if __name__ == "__main__":
    main(*sys.argv[1:])
