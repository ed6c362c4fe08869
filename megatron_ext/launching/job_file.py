"""Writes the file of a job: a template of its scheduler, with the cluster's profile and the run filled in."""

import re
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.errors import ConfigError
from megatron_ext.files import write_text
from megatron_ext.launching.profile import Profile

MARK = "# Written by tools/launch.py"
_DIRECTIVE = {"slurm": "#SBATCH", "pbs": "#PBS", "age": "#$"}
SUBMIT = {"slurm": "sbatch", "pbs": "qsub", "age": "qsub"}
"""What takes a job file."""
_TIME = re.compile(r"^(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)$")


@dataclass(frozen=True)
class Job:
    """One job to be written."""

    run: Path
    """The run's YAML."""
    overrides: Sequence[str]
    profile: Profile
    profile_name: str
    nodes: int
    seconds: int
    """How long it may take."""
    name: str
    logs: Path
    """Folder of the logs."""
    root: Path
    """The repository."""
    place: Path
    """Where the command was given: paths of the run that are relative start there."""
    python: Path
    """Of the ranks, where there is no container."""
    file: Path
    """The job file."""


def parse_time(text: str) -> int:
    """Seconds of H:MM:SS or D-HH:MM:SS; ConfigError where it is neither."""
    if (match := _TIME.match(text)) is None:
        raise ConfigError(f"--time {text}: expected HOURS:MM:SS or DAYS-HH:MM:SS, such as 48:00:00")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((24 * days + hours) * 60 + minutes) * 60 + seconds


def job_text(job: Job) -> str:
    """The job file."""
    profile = job.profile
    hours, minutes = divmod(job.seconds // 60, 60)
    limit = f"{hours}:{minutes:02d}:{job.seconds % 60:02d}"
    directive = _DIRECTIVE[profile.scheduler]
    directives = [line.format(nodes=job.nodes, time=limit) for line in profile.directives]
    container = profile.container
    srun, prefix = _container(job)
    values = {
        "mark": f"{MARK} on {time.strftime('%Y-%m-%d %H:%M')} from the profile {job.profile_name}",
        "submit": SUBMIT[profile.scheduler],
        "name": job.name,
        "nodes": str(job.nodes),
        "time": limit,
        "seconds": str(job.seconds),
        "signal_seconds": str(round(60 * profile.minutes_before_limit)),
        "minutes_before_limit": f"{profile.minutes_before_limit:g}",
        "logs": str(job.logs),
        "logs_quoted": shlex.quote(str(job.logs)),
        "place": shlex.quote(str(job.place)),
        "torchrun": shlex.quote(str(job.root / "launch" / "torchrun.sh")),
        "directives": "\n".join(f"{directive} {line}" for line in directives),
        "prepare": "\n".join(profile.prepare) or ":",
        "environment": "\n".join(
            f'# {variable.why}\nexport {variable.name}="{variable.value}"' for variable in profile.environment
        ),
        "processes": str(profile.processes),
        "file": shlex.quote(str(job.file)),
        "python": shlex.quote(container.python if container is not None else str(job.python)),
        "max_requeues": str(profile.max_requeues),
        "max_restarts": str(profile.max_restarts),
        "node_test": "1" if profile.node_test else "0",
        "srun_options": " ".join(map(shlex.quote, srun)),
        "prefix": " ".join(map(shlex.quote, prefix)),
        "run": " ".join(map(shlex.quote, [str(job.run), *profile.overrides, *job.overrides])),
    }
    templates = job.root / "launch" / "templates"
    template = (templates / f"{profile.scheduler}.sh").read_text()
    # What several schedulers have alike comes first: it has values of its own to fill in.
    whole = re.sub(r"\{\{(\w+\.inc)\}\}", lambda match: (templates / match[1]).read_text().rstrip(), template)
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], whole)


def _container(job: Job) -> tuple[list[str], list[str]]:
    """Options of srun, and what the ranks' command stands behind."""
    container, profile = job.profile.container, job.profile
    if container is None:
        return [], []
    mounts = list(dict.fromkeys([str(job.root), str(job.place), str(job.logs), *profile.shared, *container.mounts]))
    if container.kind == "apptainer":
        binds = [part for mount in mounts for part in ("--bind", mount)]
        return [], ["apptainer", "exec", "--nv", *binds, container.image]
    both_sides = ",".join(mount if ":" in mount else f"{mount}:{mount}" for mount in mounts)
    names = ",".join(variable.name for variable in profile.environment)
    return [
        f"--container-image={container.image}",
        f"--container-workdir={job.place}",
        f"--container-mounts={both_sides}",
        *([f"--container-env={names}"] if names else []),
    ], []


def write_job(job: Job) -> None:
    """Write the job file; one that this tool did not write is left alone, with a ConfigError."""
    path = job.file
    if path.exists() and MARK not in path.read_text(errors="replace"):
        raise ConfigError(f"--output {path}: is there, and was not written by this tool; name another file")
    path.parent.mkdir(parents=True, exist_ok=True)
    job.logs.mkdir(parents=True, exist_ok=True)
    write_text(path, job_text(job))
