"""A command beside the run evaluates each checkpoint once: told, resumed, bounded, and ended with the run."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from megatron_ext.checkpoint.find import checkpoint_name
from megatron_ext.checkpoint.metadata import METADATA_FILE
from megatron_ext.config import EvaluationConfig
from megatron_ext.monitoring.events import Event
from megatron_ext.monitoring.metrics_file import MetricsFile, read_evaluated, read_history
from megatron_ext.training.hooks.base import StepDone
from megatron_ext.training.hooks.evaluating import Evaluating
from megatron_ext.training.hooks.side_process import EvaluationError, SideProcess
from megatron_ext.training.verdict import Take
from tests.support.waiting import HANGS, wait_for_ends, wait_until


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Run:
    """A run whose checkpoints are empty; its events go to a metrics file, as reports have it."""

    def __init__(self, directory: Path, command: str, step: int = 0, **settings: Any) -> None:
        self.directory, self.events, self.metrics = directory, list[Event](), directory / "metrics.jsonl"
        self._file = MetricsFile(self.metrics, step)
        config = EvaluationConfig(on_checkpoint=command, **settings)
        self.hook = Evaluating(config, directory, self.metrics, self.tell)
        kept = SimpleNamespace(keep=lambda in_use: None)
        self.session: Any = SimpleNamespace(checkpoints=kept, state=SimpleNamespace(iteration=step))
        self.hook.on_start(self.session)

    def tell(self, event: Event) -> None:
        self.events.append(event)
        self._file.write(event.record())

    def save(self, step: int) -> Path:
        checkpoint = self.directory / checkpoint_name(step)
        checkpoint.mkdir()
        for name in (METADATA_FILE, "__0_0.distcp"):
            (checkpoint / name).touch()
        self.step(step)
        self.hook.after_save(checkpoint)
        return checkpoint

    def step(self, step: int, signal: int = 0) -> None:
        self.hook.after_step(self.session, StepDone(step, 100, Take(), 0, signal=signal))


SCORE = """echo starting; echo "{\\"score\\": $STEP.5}"; echo '{"x/y": 2}'; test -d "$CHECKPOINT" && python -c pass"""


def test_each_checkpoint_is_evaluated_once_also_across_a_stop(tmp_path: Path) -> None:
    run = Run(tmp_path, f"while ! test -e {tmp_path}/gate_$STEP; do sleep 0.05; done; {SCORE}", keep_waiting=1)
    saved = [run.save(step) for step in (1, 2, 3)]
    assert run.hook.in_use() == [saved[0], saved[2]]  # the one that runs, and of those that wait the newest
    assert run.hook.figures() == {"evaluation_lag_steps": 2}
    (tmp_path / "gate_1").touch()
    wait_until(lambda: run.step(3) or run.events)
    (event,) = run.events
    assert (event.kind, event.iteration) == ("evaluation", 1)
    assert event.details["results"] == {"score": 1.5, "x/y": 2.0}
    assert event.panels == {"evaluation/score": 1.5, "evaluation/x/y": 2.0}
    run.step(4, signal=15)
    run.hook.close()  # waits for nothing
    assert len(run.events) == 1
    again = Run(tmp_path, SCORE, step=4)
    again.save(5)
    again.hook.close()  # a run that is over waits for the rest
    assert [event.iteration for event in again.events] == [2, 3, 5]
    assert read_evaluated(run.metrics) == {1, 2, 3, 5}
    assert again.hook.figures() == {"evaluation_lag_steps": 0}
    # A run that goes on from before forgets what was known of later checkpoints.
    MetricsFile(run.metrics, 2).close()
    assert read_evaluated(run.metrics) == {1, 2}
    assert [event["iteration"] for event in read_history(run.metrics).events] == [1, 2]


@pytest.mark.parametrize(
    ("command", "complaint", "settings"),
    [
        ("echo no room >&2; exit 3", "failed: exit code 3: no room (all of it: ", {}),
        ('echo \'{"a": "b"}\'', 'failed: it printed no line such as {"name": 1.5}', {}),
        ('rm -r "$EVALUATION_DIRECTORY"; exit 3', "failed: exit code 3; what it said cannot be read: ", {}),
        ("sleep 60", "failed: it took longer than evaluation.timeout_minutes, 0.001", {"timeout_minutes": 0.001}),
    ],
    ids=["exit code", "no numbers", "folder removed", "too long"],
)
def test_failures_are_told_and_tried_again(
    command: str, complaint: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    run = Run(tmp_path, command, **settings)
    run.save(1)
    run.hook.close()
    (event,) = run.events
    assert (event.kind, event.severity) == ("evaluation_failed", "warning")
    assert complaint in event.text
    assert read_evaluated(run.metrics) == set()


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (b'{"a": 1' + b"0" * 400 + b'}\n{"a": 1}\n', {"a": 1.0}),
        (b'{"\\ud800": 1}\n\xff\n', {"?": 1.0}),
        (b'{"a":' * 100_000 + b"\n", "it printed no line such as"),
        (b"".join(b'{"%d": 1}\n' % i for i in range(1001)), "it printed 1,001 numbers"),
        (None, "its output cannot be read: [Errno 2]"),
    ],
    ids=["beyond a float", "half a character", "deep", "too many", "removed"],
)
def test_no_output_ends_the_run(output: bytes | None, expected: dict[str, float] | str, tmp_path: Path) -> None:
    process = SideProcess("true", tmp_path, 1, tmp_path / "own", 60.0)
    process.end()
    if output is None:
        process.output.unlink()
    else:
        process.output.write_bytes(output)
    if isinstance(expected, dict):
        assert process.results() == expected
    else:
        with pytest.raises(EvaluationError) as error:
            process.results()
        assert expected in str(error.value)


def test_a_checkpoint_that_went_before_its_turn_is_told(tmp_path: Path) -> None:
    run = Run(tmp_path, SCORE)
    (tmp_path / checkpoint_name(1)).mkdir()
    run.hook.after_save(tmp_path / checkpoint_name(1))
    assert "iter_0000001 was removed before its evaluation began" in run.events[0].text


_KILLED = """
import os, signal, sys, time
from pathlib import Path
from megatron_ext.training.hooks.side_process import SideProcess
folder = Path(sys.argv[1])
SideProcess(f"sleep 600 & echo $! > {folder}/pid; env > {folder}/env; sleep 600", folder, 7, folder, 60.0)
while not (folder / "env").exists(): time.sleep(0.02)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_it_does_not_outlive_a_run_that_is_killed(tmp_path: Path) -> None:
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "4", "MASTER_PORT": "1"}
    subprocess.run([sys.executable, "-c", _KILLED, str(tmp_path)], env=environment, timeout=HANGS, check=False)
    pid = int((tmp_path / "pid").read_text())
    wait_for_ends([pid])
    told = (tmp_path / "env").read_text()
    assert f"CHECKPOINT={tmp_path}\n" in told
    assert "STEP=7\n" in told
    assert not any(f"\n{name}=" in f"\n{told}" for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
