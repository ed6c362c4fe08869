#!/usr/bin/env python
"""A run to which everything happens that happens to runs: does it end with the losses of an undisturbed one?

python benchmarks/soak.py --folder DIR              500 steps, half an hour on 2 cores
python benchmarks/soak.py --folder DIR --record     and append the table to benchmarks/RESULTS.md
python benchmarks/soak.py --folder DIR --steps 60   does it run?

Two processes train a small MoE model with a checkpoint every 10 steps. Every 10 to 20 steps something happens, in an
order drawn with --seed: ranks and launchers are killed, signals come, checkpoints are damaged, the disk is full (with
--small-disk, a folder on a file system of 256 MB that may be filled up, as a tmpfs), and the webhook that alerts go
to is dead. Then the same command is started again, as an operator would. At the end every step's loss must be that of
the undisturbed run to the last bit, the metrics file must have each step once, and every event must have been told.
"""

import argparse
import contextlib
import html
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
from report import hardware, markdown_table, record, versions
from run_data import ROOT, prepare

from megatron_ext.checkpoint.find import find_checkpoint
from megatron_ext.config import dump_yaml
from megatron_ext.config.alerts import AlertsConfig
from megatron_ext.monitoring.events import STARTED
from megatron_ext.monitoring.metrics_file import read_metrics

VOCABULARY, PROCESSES = 1024, 2
REFUSED = "step 0: failed before its first step"
"""How the alert of a start that was refused begins."""
URL_VARIABLE = "MEGATRON_EXT_SOAK_WEBHOOK"
NOT_SAVED = re.compile(rb"It is tried again at the next step that saves|(The run ends without it)")
"""How the log says that a save has failed, or the last one."""


class Webhook:
    """Takes alerts on this machine; while it is dead it answers nobody."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.is_dead = False
        self.refused = 0
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if owner.is_dead:
                    owner.refused += 1
                    self.send_error(503)
                    return
                owner.texts.append(json.loads(body)["text"])
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._server.server_port}/alerts"


@dataclass
class Soak:
    """A run, the processes that train it at the moment, and what was done to them."""

    yaml: Path
    directory: Path
    webhook: Webhook
    draws: random.Random
    log: Path
    done: Counter[str] = field(default_factory=Counter)
    refused_starts: int = 0
    launcher: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the run, or go on with it, as an operator does."""
        environment = {**os.environ, "NPROC_PER_NODE": str(PROCESSES), "OMP_NUM_THREADS": "1", "MASTER_ADDR": ""}
        environment |= {"PYTHON": sys.executable, URL_VARIABLE: self.webhook.url}
        with self.log.open("a") as log:
            log.write(f"\n== started after {sum(self.done.values())} disturbances\n")
            log.flush()
            self.launcher = subprocess.Popen(
                [str(ROOT / "launch" / "torchrun.sh"), str(self.yaml)], stdout=log, stderr=log, env=environment
            )

    def steps(self) -> int:
        """Steps that are reported."""
        metrics = self.directory / "metrics.jsonl"
        losses = [r["iteration"] for r in read_metrics(metrics) if "loss" in r] if metrics.is_file() else [0]
        return losses[-1] if losses else 0

    def is_running(self) -> bool:
        """Whether the launcher has not ended yet."""
        return self.launcher is not None and self.launcher.poll() is None

    def wait(self, steps: int) -> bool:
        """Wait until so many steps are reported; whether the run still goes on then."""
        while self.is_running():
            if self.steps() >= steps:
                return True
            time.sleep(0.1)
        return False

    def ended(self, seconds: float = 1800) -> int:
        """Wait for the launcher's end, and for all it started; its exit code."""
        assert self.launcher is not None
        code, deadline = self.launcher.wait(seconds), time.monotonic() + seconds
        while alive := self.ranks():
            if time.monotonic() > deadline:
                raise SystemExit(f"processes outlived their launcher: {alive}")
            time.sleep(0.1)
        return code

    def ranks(self) -> list[psutil.Process]:
        """The processes that train; one that has ended has no command line, whether or not anybody knows its code."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            command = process.info["cmdline"] or []
            if str(self.yaml) in command and any(part.endswith("train.py") for part in command):
                found.append(process)
        return found

    def signal_launcher(self, number: signal.Signals) -> None:
        """Send the launcher a signal, and wait for the end."""
        assert self.launcher is not None
        self.launcher.send_signal(number)
        self.ended()


def kill(process: psutil.Process) -> None:
    """Kill -9, unless it has ended since it was found."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()


def kill_rank(soak: Soak) -> None:
    """Kill -9 of one rank: the other ends, and names it."""
    if ranks := soak.ranks():
        kill(soak.draws.choice(ranks))
    soak.ended()


def kill_launcher(soak: Soak) -> None:
    """Kill -9 of the launcher: its ranks end by themselves."""
    soak.signal_launcher(signal.SIGKILL)


def kill_all(soak: Soak) -> None:
    """Kill -9 of everything at once, as a node that loses its power."""
    assert soak.launcher is not None
    soak.launcher.kill()
    for process in soak.ranks():
        kill(process)
    soak.ended()


def terminate(soak: Soak) -> None:
    """SIGTERM: the step is finished and saved."""
    soak.signal_launcher(signal.SIGTERM)


def user_signal(soak: Soak) -> None:
    """SIGUSR1, as Slurm sends it before the time is over."""
    soak.signal_launcher(signal.SIGUSR1)


def damage(soak: Soak) -> None:
    """A file of the newest checkpoint is damaged: the next start refuses it, and its operator removes it as told."""
    kill_all(soak)
    newest = find_checkpoint(soak.directory)
    if newest is None or len(list(soak.directory.glob("iter_*"))) < 2:
        return
    file = soak.draws.choice([path for path in sorted(newest.iterdir()) if path.is_file() and path.stat().st_size])
    content = bytearray(file.read_bytes())
    if soak.draws.random() < 0.5:
        content = content[: len(content) // 2]
    else:
        content[soak.draws.randrange(len(content))] ^= 0xFF
    file.write_bytes(content)
    soak.start()
    code = soak.ended()
    if code != 2:
        raise SystemExit(f"{newest.name}/{file.name} was damaged, and the run ended with {code} instead of 2")
    soak.refused_starts += 1
    shutil.rmtree(newest)


def dead_webhook(soak: Soak) -> None:
    """The webhook is dead while the run is told to stop and goes on."""
    soak.webhook.is_dead = True
    soak.signal_launcher(signal.SIGTERM)
    soak.start()
    soak.wait(soak.steps() + 3)
    soak.webhook.is_dead = False


def full_disk(soak: Soak) -> None:
    """The disk is full until a save has failed; if that was the run's last one, it ends and is started again."""
    ballast = soak.directory.parent / "ballast"
    free = shutil.disk_usage(soak.directory).free
    with ballast.open("wb") as file:
        while free > 2**16:
            file.write(bytes(min(free - 2**16, 2**20)))
            file.flush()
            free = shutil.disk_usage(soak.directory).free
    # Reports of steps cannot be written either, so that the log tells how far the run is.
    already = soak.log.stat().st_size
    failed = None
    while soak.is_running() and not (failed := NOT_SAVED.search(soak.log.read_bytes(), already)):
        time.sleep(0.1)
    ballast.unlink()
    if failed and failed[1]:
        soak.ended()


Disturbance = Callable[[Soak], None]
GOING_ON = (full_disk, dead_webhook)
"""After these the run still goes on, unless it was at its end."""


def disturb(soak: Soak, steps: int, kinds: list[Disturbance]) -> None:
    """Train to the end under disturbances."""
    waiting: list[Disturbance] = []
    soak.start()
    while soak.wait(soak.steps() + soak.draws.randint(10, 20)):
        if soak.steps() > steps - 5:
            soak.wait(10**9)
            break
        if not waiting:
            waiting = soak.draws.sample(kinds, len(kinds))  # each kind as often as the others
        what = waiting.pop()
        soak.done[what.__name__] += 1
        print(f"step {soak.steps()}: {what.__name__}", flush=True)
        what(soak)
        if what not in GOING_ON or not soak.is_running():
            soak.ended()
            soak.start()
    if (code := soak.ended()) != 0:
        raise SystemExit(f"the run ended with exit code {code} at step {soak.steps()}; see {soak.log}")


def configuration(folder: Path, directory: Path, steps: int) -> dict[str, Any]:
    """The run."""
    return {
        "model": {
            "num_layers": 2,
            "hidden_size": 64,
            "ffn_hidden_size": 128,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 128,
            "num_moe_experts": 4,
            "moe_ffn_hidden_size": 64,
            "moe_aux_loss_coeff": 0.01,
        },
        "parallel": {"expert_model_parallel_size": 2},
        "precision": {"kind": "fp32"},
        "train": {"train_iters": steps, "global_batch_size": 8, "micro_batch_size": 2, "eval_interval": 50},
        "optimizer": {"kind": "adam", "lr": 1e-3},
        "schedule": {"kind": "cosine", "warmup_iters": 10},
        "data": {
            "sequence_length": 128,
            "tokenizer": str(folder / "tokenizer"),
            "train": [{"path": str(folder / "data" / "train")}],
            "validation": [{"path": str(folder / "data" / "validation")}],
        },
        "checkpoint": {"directory": str(directory), "save_interval": 10, "keep_last": 3},
        "alerts": {"webhook": {"url_variable": URL_VARIABLE}, "repeat_seconds": 0},
        "runtime": {"device": "cpu", "threads": 1},
    }


def losses(directory: Path) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm of every step."""
    reports = [report for report in read_metrics(directory / "metrics.jsonl") if "loss" in report]
    if len({report["iteration"] for report in reports}) != len(reports):
        raise SystemExit(f"{directory}: a step is reported twice")
    return {report["iteration"]: (report["loss"], report["grad_norm"]) for report in reports}


@dataclass
class Told:
    """What people had to be told of, beside what the webhook took."""

    due: Counter[str]
    """The events of the kinds that are told, as a message has them, and how often each happened."""
    came: Counter[str]
    late: int
    """Messages that a later start has sent."""

    @property
    def lost(self) -> list[str]:
        """What never came."""
        return sorted((self.due - self.came).elements())

    @property
    def again(self) -> int:
        """Messages that came twice: the sender was killed before it could note that it had sent them."""
        return sum((self.came - self.due).values())


def told(soak: Soak) -> Told:
    """Compare the run's own events, and the starts that were refused, with the messages that came."""
    due = Counter({REFUSED: soak.refused_starts})
    for name in ("metrics.jsonl", "metrics.superseded.jsonl"):
        for line in (soak.directory / name).read_text().splitlines() if (soak.directory / name).exists() else ():
            event = json.loads(line)
            kind = event.get("event")
            if (STARTED if kind == "start" else kind) in AlertsConfig().events:
                due[f"step {event['iteration']}: {event['text'].splitlines()[0]}"] += 1
    came, late = Counter[str](), 0
    for text in soak.webhook.texts:
        _, said, *rest = html.unescape(text).splitlines()
        came[REFUSED if said.startswith(REFUSED) else said] += 1
        late += any("could not be sent before that process ended" in line for line in rest)
    return Told(due, came, late)


def run(folder: Path, small_disk: Path | None, steps: int, seed: int) -> tuple[Soak, Told, list[str]]:
    """Both runs, and what they have otherwise."""
    prepare(folder, VOCABULARY)
    soaks = []
    for name, place in (("undisturbed", folder), ("disturbed", small_disk or folder)):
        yaml = folder / f"{name}.yaml"
        yaml.write_text(dump_yaml(configuration(folder, place / name, steps)))
        soaks.append(Soak(yaml, place / name, Webhook(), random.Random(seed), folder / f"{name}.log"))
    calm, soak = soaks
    disturb(calm, 0, [])
    kinds: list[Disturbance] = [kill_rank, kill_launcher, kill_all, terminate, user_signal, damage, dead_webhook]
    if small_disk is not None:
        kinds.append(full_disk)
    disturb(soak, steps, kinds)
    wanted, found = losses(calm.directory), losses(soak.directory)
    faults = [
        f"step {step}: {found.get(step)} for {wanted[step]}" for step in wanted if found.get(step) != wanted[step]
    ]
    never = [f"{kind.__name__} was never drawn: take more steps" for kind in kinds if not soak.done[kind.__name__]]
    alerts = told(soak)
    return soak, alerts, faults + [f"nobody was told: {one}" for one in alerts.lost] + never


def main() -> None:
    """Run it and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500, metavar="N", help="length of the run (default 500)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the disturbances (default 0)")
    parser.add_argument("--folder", type=Path, required=True, metavar="DIR", help="a new folder for both runs")
    parser.add_argument("--small-disk", type=Path, metavar="DIR", help="a folder on a small disk, which is filled up")
    parser.add_argument("--record", action="store_true", help="append the table to benchmarks/RESULTS.md")
    options = parser.parse_args()
    options.folder.mkdir(parents=True)
    begin = time.monotonic()
    soak, alerts, faults = run(options.folder, options.small_disk, options.steps, options.seed)
    rows = [[name.replace("_", " "), str(count)] for name, count in sorted(soak.done.items()) if count]
    verdict = f"{len(faults)} faults" if faults else "every loss and gradient norm is the undisturbed run's"
    due = alerts.due.total()
    text = f"""{hardware()}; {versions("torch", "megatron-core")}

{markdown_table(["disturbance", "times"], rows)}

{options.steps} steps in {time.monotonic() - begin:.0f} s: {verdict}.
Alerts: {due} were due, {due - len(alerts.lost)} came, {len(alerts.lost)} lost; a later start has sent {alerts.late}
of them, {soak.webhook.refused} attempts were refused, {alerts.again} came twice."""
    print(text)
    for fault in faults[:10]:
        print(fault)
    if options.record:
        record("A run under disturbances", text)
    raise SystemExit(1 if faults else 0)


if __name__ == "__main__":
    main()
