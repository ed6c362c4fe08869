"""What speaks against a job before it is queued: its layout, its folders, its time and its memory."""

import math
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from megatron_ext.config import RunConfig
from megatron_ext.config.load import paths_of
from megatron_ext.errors import ConfigError
from megatron_ext.launching.job_file import SUBMIT, Job
from megatron_ext.monitoring.metrics_file import read_metrics
from megatron_ext.monitoring.monitor import metrics_path
from megatron_ext.planning.amounts import duration
from megatron_ext.planning.flops import training_flops_per_token
from megatron_ext.planning.peak_memory import PeakMemory, peak_memory

_LOCAL_DISKS = ("ext2", "ext3", "ext4", "xfs", "btrfs", "tmpfs", "overlay", "zfs")
"""File systems that one machine alone has, as a rule."""
_USUAL_MFU = 0.35
"""Share of the peak that a run of which nothing was measured is taken to reach: a guess, and said to be one."""
_FULL = 0.9
"""Share of a GPU's memory that tensors may take; the context, NCCL and the allocator need some as well."""
_ANSWER = 60.0
"""Seconds that a scheduler has."""
_SHORTEST = 20
"""Minutes of a job, beside what it saves in, below which it is hardly worth its start."""


@dataclass
class Findings:
    """What was found, for people."""

    faults: list[str] = field(default_factory=list)
    """The job cannot run so."""
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check_job(job: Job, run: RunConfig, steps: int) -> Findings:
    """Hold the job against the run and the profile; the run's own files are looked at by training/startup_checks.py.

    Args:
        steps: of the whole run.
    """
    found = Findings()
    processes = job.nodes * job.profile.processes
    try:
        layout = run.resolve(processes)
    except ConfigError as error:
        found.faults += [f"--nodes {job.nodes} x {job.profile.processes}: {line}" for line in str(error).splitlines()]
    else:
        found.notes.append(
            f"layout          {processes} processes: TP {layout.tp} x CP {layout.cp} x DP {layout.dp} x PP {layout.pp}"
            f", EP {layout.ep}, {layout.num_microbatches} micro-batches a step"
        )
        _look_at_groups(job, layout.tp, found)
        _look_at_memory(job, peak_memory(run, layout), found)
        _estimate_time(job, run, steps, processes, found)
    _look_at_time(job, found)
    _look_at_places(job, run, found)
    return found


def _look_at_groups(job: Job, tp: int, found: Findings) -> None:
    if tp > job.profile.processes:
        found.warnings.append(
            f"parallel.tensor_model_parallel_size = {tp} is more than the {job.profile.processes} GPUs of a node: "
            "every layer would wait for the network"
        )


def _look_at_memory(job: Job, peak: PeakMemory, found: Findings) -> None:
    room = job.profile.gpu_memory_gib
    if room is None:
        found.notes.append("memory          not checked: the profile has no gpu_memory_gib")
        return
    state, total = peak.state / 2**30, peak.total / 2**30
    line = f"with {state:.3g} GiB of state a step takes {total:.3g} GiB on the fullest rank, and a GPU has {room:g}"
    if state >= room:
        found.faults.append(f"{line}: split the model further (TP, PP, EP), or take more nodes")
    elif total > _FULL * room:
        found.warnings.append(f"{line}: it may run out of it; `recompute`, or what tools/plan.py offers, takes less")
    else:
        found.notes.append(f"memory          {line}")


def _look_at_time(job: Job, found: Findings) -> None:
    profile, minutes = job.profile, job.seconds / 60
    if profile.longest_hours is not None and minutes > 60 * profile.longest_hours:
        found.faults.append(
            f"--time is {duration(job.seconds)}, and {job.profile_name} takes {profile.longest_hours:g} h"
        )
    if minutes <= profile.minutes_before_limit:
        found.faults.append(
            f"--time is {duration(job.seconds)}, of which minutes_before_limit = {profile.minutes_before_limit:g} are "
            "for saving: nothing is left to train"
        )
    elif minutes < profile.minutes_before_limit + _SHORTEST:
        found.warnings.append(f"--time is {duration(job.seconds)}: little more than a start and a checkpoint")


def _estimate_time(job: Job, run: RunConfig, steps: int, processes: int, found: Findings) -> None:
    """Note how many jobs of this length the run takes."""
    profile, known = job.profile, _seconds_a_step(job, run, processes)
    if known is None:
        found.notes.append("time            not estimated: nothing was measured, and the profile has no peak_tflops")
        return
    each, source, done = known
    left = max(steps - done, 0) * each
    jobs = math.ceil(left / max(job.seconds - 60 * profile.minutes_before_limit, 1))
    found.notes.append(
        f"time            {steps - done:,} steps of about {each:.3g} s ({source}): {duration(left)}, {jobs:,} "
        f"job{'s' if jobs != 1 else ''} of this length"
    )
    if jobs > profile.max_requeues + 1:
        found.warnings.append(
            f"the run takes about {jobs:,} jobs of --time, and max_requeues = {profile.max_requeues}: somebody will "
            "have to queue it again"
        )


def _seconds_a_step(job: Job, run: RunConfig, processes: int) -> tuple[float, str, int] | None:
    """Seconds, where they are from, and steps done: measured by the run itself if it has been, or else a guess."""
    path = metrics_path(run)
    measured = [record for record in read_metrics(path) if "seconds_per_step" in record] if path.is_file() else []
    if measured:
        last = measured[-20:]
        seconds = sorted(record["seconds_per_step"] for record in last)[len(last) // 2]
        return seconds, f"as measured in {path}, on however many GPUs that was", int(last[-1]["iteration"])
    if job.profile.peak_tflops is None:
        return None
    work = max(run.step_tokens) * training_flops_per_token(run.model, run.data.sequence_length, run.adapters, run.task)
    rate = processes * job.profile.peak_tflops * 1e12 * _USUAL_MFU
    return work / rate, f"a guess: {_USUAL_MFU:.0%} of the peak, nothing was measured", 0


def _look_at_places(job: Job, run: RunConfig, found: Findings) -> None:
    """Note paths that not every node will see."""
    paths = {**paths_of(run), "the repository": str(job.root), "RUN.yaml": str(job.run), "logs": str(job.logs)}
    if job.profile.container is None:
        paths["python"] = str(job.python)
    if job.nodes == 1:
        return
    shared, local = [Path(folder) for folder in job.profile.shared], []
    for key, text in paths.items():
        place = Path(os.path.abspath(text))
        if shared:
            if not any(place.is_relative_to(folder) or place.resolve().is_relative_to(folder) for folder in shared):
                folders = ", ".join(map(str, shared))
                found.faults.append(f"{key} = {place}: not every node sees it; below {folders} it would be (shared)")
        elif _file_system(place) in _LOCAL_DISKS:
            local.append(f"{key} = {place}")
    if local:
        found.warnings.append(
            f"on a disk of this machine alone, as it seems, unseen by other nodes: {', '.join(local)} (say in "
            "the profile what is shared)"
        )


def _file_system(place: Path) -> str:
    """The kind of file system that `place` is, or will be, on."""
    parts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    return next((parts[folder] for folder in (place, *place.parents) if folder in parts), "")


def file_faults(job: Job, *, asks_scheduler: bool) -> Iterator[str]:
    """What bash finds wrong with the job file, and the scheduler where it is asked."""
    commands = [["bash", "-n", str(job.file)]]
    if asks_scheduler and job.profile.scheduler == "slurm":
        commands.append(["sbatch", "--test-only", str(job.file)])
    for command in commands:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER)
        except subprocess.TimeoutExpired:
            yield f"{' '.join(command)}: no answer within a minute"
            continue
        if done.returncode:
            yield f"{' '.join(command)}: {done.stderr.strip()}"


def scheduler_away(scheduler: str) -> str | None:
    """Why jobs cannot be queued from this machine; None where the scheduler is here, and Slurm's answers."""
    if shutil.which(SUBMIT[scheduler]) is None:
        return f"there is no {SUBMIT[scheduler]} on this machine"
    if scheduler != "slurm":
        return None
    try:  # sbatch itself waits for a controller that is away, and then blames the job
        asked = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, timeout=_ANSWER)
    except FileNotFoundError:
        return None
    except subprocess.TimeoutExpired:
        return "Slurm does not answer (scontrol ping: nothing within a minute)"
    if asked.returncode == 0 or " is UP" in asked.stdout:
        return None
    said = (asked.stdout.strip().splitlines()[:1] or asked.stderr.strip().splitlines()[-1:] or ["nothing"])[0]
    return f"Slurm does not answer (scontrol ping: {said})"
