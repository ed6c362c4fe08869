"""Starts, feeds and ends a W&B run as training does, in a process of its own: wandb reads its environment only once.

Arguments: directory, mode, first step, last step, and `kill` to end wandb's service process after the start.
"""

import contextlib
import logging
import sys
from pathlib import Path

import psutil

from megatron_ext.config import WandbConfig
from megatron_ext.monitoring.alerts.message import Message
from megatron_ext.monitoring.events import Event
from megatron_ext.monitoring.sinks import wandb as wandb_sink
from megatron_ext.monitoring.sinks.wandb import WandbSink


def main(directory: str, mode: str, first: str, last: str, kill: str = "") -> None:
    logging.basicConfig(level=logging.INFO)
    wandb_sink._FINISH_SECONDS = wandb_sink._FINISH_MARGIN_SECONDS = 3
    run = WandbSink(WandbConfig(mode=mode), "abcd1234", Path(directory), {"model": {"num_layers": 4}})
    if kill:
        service = [p for p in psutil.Process().children(recursive=True) if p.name().startswith("wandb")]
        assert service
        for process in service:
            process.kill()
    for step in range(int(first), int(last) + 1):
        run.log({"loss": 1.0 / step, "load": wandb_sink._load([0.5, 0.25, 0.25])}, step)
    run.event(Event("evaluation", int(first), "late", panels={"evaluation/score": 0.5}))
    with contextlib.suppress(ConnectionError):  # after its death; whoever sends keeps it then
        run.send(Message("moe: skip", "step 1: a spike", "warning"))
    run.close()
    print("training went on to its end")


if __name__ == "__main__":
    main(*sys.argv[1:])
