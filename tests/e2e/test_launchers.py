"""launch/torchrun.sh on one node and on two that are both this machine; how it ends; launch/slurm.sbatch alone."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ext.testing.ports import free_port
from tests.support.waiting import HANGS, ended_at_last
from tests.support.webhook_server import WebhookServer
from tests.support.workspace import ROOT, prepare_data, reported_losses, run_mapping, write_run


def start(*arguments: str | Path, **environment: str) -> subprocess.Popen[str]:
    inherited = {k: v for k, v in os.environ.items() if k not in ("MASTER_ADDR", "MASTER_PORT", "NNODES", "NODE_RANK")}
    return subprocess.Popen(
        [ROOT / "launch" / "torchrun.sh", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**inherited, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment},
    )


def test_two_nodes_train_like_one(tmp_path: Path) -> None:
    prepare_data(tmp_path)
    run = write_run(tmp_path / "run.yaml", run_mapping(tmp_path))
    one = start(run, f"checkpoint.directory={tmp_path / 'one'}", NPROC_PER_NODE="2")
    _, errors = one.communicate(timeout=HANGS)
    assert one.returncode == 0, errors
    port = str(free_port())
    nodes = [
        start(
            run,
            f"checkpoint.directory={tmp_path / 'two'}",
            NPROC_PER_NODE="1",
            NNODES="2",
            NODE_RANK=str(rank),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
            GLOO_SOCKET_IFNAME="lo",
        )
        for rank in range(2)
    ]
    with ended_at_last(nodes[0]), ended_at_last(nodes[1]):
        for node in nodes:
            _, errors = node.communicate(timeout=HANGS)
            assert node.returncode == 0, errors
    assert reported_losses(tmp_path / "one") == reported_losses(tmp_path / "two")


@pytest.mark.parametrize(
    ("said", "gpus", "expected"),
    [
        ({}, 2, "expandable_segments:True"),
        ({}, 0, "unset"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, 2, "backend:native"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, 2, "max_split_size_mb:64"),
    ],
)
def test_memory_of_a_gpu_may_grow_in_place_unless_the_user_says_how(
    said: dict[str, str], gpus: int, expected: str, tmp_path: Path
) -> None:
    for name, line in (("nvidia-smi", f"seq {gpus}"), ("python", 'echo "${PYTORCH_ALLOC_CONF:-unset}"')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    usual = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python")}
    output, errors = start("run.yaml", **usual, **said).communicate(timeout=HANGS)
    assert output.split() == [expected], errors


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"NNODES": "2"}, "need MASTER_ADDR"),
        ({"MASTER_ADDR": "a"}, "set NNODES"),
        ({"NPROC_PER_NODE": "two"}, "NPROC_PER_NODE=two: must be a whole number"),
    ],
)
def test_what_is_missing_is_said_before_anything_starts(
    environment: dict[str, str], message: str, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "run.yaml", run_mapping(tmp_path))
    process = start(run, "parallel.tensor_model_parallel_size=2", **environment)
    _, errors = process.communicate(timeout=HANGS)
    assert process.returncode == 2
    assert message in errors
    assert errors.count("error: ") == 1
    assert "torch.distributed" not in errors


def test_people_are_told_of_a_restart_that_is_refused_before_anything_starts(tmp_path: Path) -> None:
    server = WebhookServer()
    alerts = {"alerts": {"webhook": {"url_variable": "HOOK"}}}
    run = write_run(tmp_path / "run.yaml", {**run_mapping(tmp_path), **alerts})
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"event": "start", "iteration": 0}\n')
    process = start(run, "parallel.tensor_model_parallel_size=2", NPROC_PER_NODE="3", HOOK=server.url)
    _, errors = process.communicate(timeout=HANGS)
    server.close()
    assert process.returncode == 2
    assert errors.count("error: ") == errors.count("multiple of 2") == 1
    (text,) = server.texts
    assert "failed before its first step" in text
    assert "multiple of 2" in text


def test_check_goes_through_the_launcher_and_starts_nothing(tmp_path: Path) -> None:
    prepare_data(tmp_path)
    process = start(write_run(tmp_path / "run.yaml", run_mapping(tmp_path)), "--check", NPROC_PER_NODE="2")
    printed, errors = process.communicate(timeout=HANGS)
    assert process.returncode == 0, errors
    assert printed.count("rank grid of 2 processes") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("environment", "options", "checks"),
    [
        ({}, "--standalone --max-restarts 0 --nproc-per-node 2", ["2"]),
        ({"MAX_RESTARTS": "3"}, "--standalone --max-restarts 3 --nproc-per-node 2", ["2"]),
        (
            {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a"},
            "--nnodes 2 --node-rank 1 --master-addr a --master-port 29500 --nproc-per-node 2",
            [],  # every rank looks, and tells the others
        ),
        (
            {"NNODES": "2:4", "MASTER_ADDR": "a", "MAX_RESTARTS": "3", "RDZV_CONF": "last_call_timeout=9"},
            "--nnodes 2:4 --max-restarts 3 --rdzv-backend c10d --rdzv-endpoint a:29500 --rdzv-id a:29500 "
            "--rdzv-conf last_call_timeout=9 --nproc-per-node 2",
            ["4", "8"],  # the fewest and the most
        ),
    ],
    ids=["one node", "restarts", "two nodes", "elastic"],
)
def test_what_torchrun_is_told(environment: dict[str, str], options: str, checks: list[str], tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    python.chmod(0o755)
    launcher = [ROOT / "launch" / "torchrun.sh", "run.yaml", "train.seed=1"]
    usual = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    subprocess.run(launcher, env={**usual, "PYTHON": str(python), "NPROC_PER_NODE": "2", **environment}, check=True)
    *said, last = (tmp_path / "calls").read_text().splitlines()
    assert [call.split("--world-size ")[1] for call in said] == checks
    assert all("--check --alert" in call for call in said)
    tool = ROOT / "tools" / "train.py"
    assert last == f"-P -m megatron_ext.runtime.launch {options} {tool} run.yaml train.seed=1"


def launch_ranks(directory: Path, script: str, processes: int = 2, *options: str) -> subprocess.Popen[str]:
    """Two ranks that run `script`, under the launcher that training has."""
    (directory / "rank.py").write_text(f"import os, pathlib, signal, sys, time\nrank = os.environ['RANK']\n{script}")
    launcher = [sys.executable, "-m", "megatron_ext.runtime.launch", "--standalone", "--nproc-per-node", str(processes)]
    launcher += options
    return subprocess.Popen(
        [*launcher, "rank.py"], cwd=directory, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(
    ("script", "code", "message"),
    [
        (
            "if rank == '1': os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(600)",
            2,
            "was killed by SIGKILL: often memory",
        ),
        (
            "if rank == '1': sys.exit('error: no such key')\ntime.sleep(600)",
            1,
            "ended with exit code 1; why, stands above",
        ),
        (
            "while rank == '1' and not pathlib.Path('heeds').exists(): time.sleep(0.05)\n"
            "if rank == '1': os.kill(os.getpid(), signal.SIGKILL)\n"
            "signal.signal(signal.SIGTERM, lambda *_: sys.exit(2))\npathlib.Path('heeds').touch()\ntime.sleep(600)",
            2,
            "rank 1 (process ",
        ),
        ("if rank == '1': print('said', file=sys.stderr); sys.exit(2)\ntime.sleep(600)", 2, None),
        ("if rank == '1': sys.exit(143)\ntime.sleep(600)", 143, None),
    ],
    ids=["killed", "failed", "killed, and another said so", "bad input", "interrupted"],
)
def test_the_end_of_a_rank_is_one_message(script: str, code: int, message: str | None, tmp_path: Path) -> None:
    process = launch_ranks(tmp_path, script)
    _, errors = process.communicate(timeout=HANGS)
    print(errors)
    assert process.returncode == code
    last = errors.splitlines()[-1:]
    if message is None:
        assert last in ([], ["said"])
    else:
        assert last[0].startswith(("error: rank 1 (process ", message))
        assert message in last[0]
        assert len(errors.splitlines()) == (2 if "sys.exit('" in script else 1)
    assert "Traceback" not in errors
    assert "ChildFailed" not in errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_reaches_the_ranks_and_they_end_in_their_own_time(number: signal.Signals, tmp_path: Path) -> None:
    script = (
        "def save(*_):\n    time.sleep(1)\n    pathlib.Path(f'saved {rank}').touch()\n    sys.exit(0)\n"
        f"signal.signal({int(number)}, save)\nprint('ready', flush=True)\ntime.sleep(600)"
    )
    process = launch_ranks(tmp_path, script)
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    process.send_signal(number)
    _, errors = process.communicate(timeout=HANGS)
    assert (process.returncode, errors) == (128 + number, "")
    assert sorted(path.name for path in tmp_path.glob("saved *")) == ["saved 0", "saved 1"]


def test_ranks_that_were_told_to_stop_and_could_not_save_have_not_saved(tmp_path: Path) -> None:
    script = (
        "from megatron_ext.launcher import noting_failure\n"
        "def fail(*_):\n    raise OSError('no room')\n"
        "try:\n    with noting_failure():\n"
        "        signal.signal(signal.SIGTERM, fail)\n        print('ready', flush=True)\n        time.sleep(600)\n"
        "except OSError:\n    sys.exit(2)"
    )
    process = launch_ranks(tmp_path, script)
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=HANGS)
    assert process.returncode == 2


def test_ranks_of_a_run_that_was_stopped_are_not_started_again(tmp_path: Path) -> None:
    script = (
        "from megatron_ext.launcher import exit_stopped, job_start\n"
        "pathlib.Path(f'{rank} {os.environ[\"TORCHELASTIC_RESTART_COUNT\"]}').write_text(str(job_start()))\n"
        "while not pathlib.Path('0 0').exists(): time.sleep(0.05)\n"  # else it may be ended before it has begun
        "if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0': sys.exit(3 if rank == '1' else 0)\n"
        "exit_stopped(142)"
    )
    process = launch_ranks(tmp_path, script, 2, "--max-restarts", "5")
    _, errors = process.communicate(timeout=HANGS)
    assert (process.returncode, errors) == (142, "")
    starts = {path.name: path.read_text() for path in tmp_path.glob("[01] *")}
    assert sorted(starts) == ["0 0", "0 1", "1 0", "1 1"]  # again after a failure, not after the stop
    assert len(set(starts.values())) == 1  # the job is the launcher's


def test_a_launcher_under_nohup_outlives_its_terminal(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does; children inherit it
    try:
        script = "print('ready', flush=True)\nwhile not pathlib.Path('go on').exists(): time.sleep(0.05)"
        process = launch_ranks(tmp_path, script, processes=1)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    (tmp_path / "go on").touch()
    _, errors = process.communicate(timeout=HANGS)
    assert (process.returncode, errors) == (0, "")


@pytest.mark.parametrize(("arguments", "message"), [([], "usage: sbatch"), (["run.yaml"], "is for sbatch")])
def test_the_slurm_script_outside_a_job_says_how_it_is_used(arguments: list[str], message: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    script = ROOT / "launch" / "slurm.sbatch"
    process = subprocess.run(["bash", script, *arguments], env=environment, capture_output=True, text=True)
    assert process.returncode == 2
    assert message in process.stderr
    assert "unbound" not in process.stderr
