#!/usr/bin/env python
"""Write the job file of a run for a cluster, and check everything that can be checked before it is queued.

python tools/launch.py RUN.yaml --nodes 4 --profile gcp_a3_high --time 48:00:00
python tools/launch.py RUN.yaml --nodes 4 --profile my_cluster.yaml --submit train.global_batch_size=2048

Checked are: configuration, layout on so many nodes, data, tokenizer, what the run goes on from, room on the disk,
folders that all nodes see, memory of the training state, time; and the file itself, by bash and, where Slurm answers,
by sbatch. What is wrong is said in one message, with exit code 2. A job that is stopped saves and queues itself again.
The profiles are in launch/profiles; one of yours is a YAML like those.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ext.command import path_name, positive_integer, run_command, run_parser
from megatron_ext.errors import ConfigError

if TYPE_CHECKING:
    from megatron_ext.launching.job_file import Job
    from megatron_ext.launching.profile import Profile


def main() -> None:
    """Parse the command line, check, write, and submit where that is asked for."""
    parser = run_parser(__doc__)
    parser.add_argument("--nodes", type=positive_integer, required=True, metavar="N", help="nodes of the job")
    parser.add_argument(
        "--profile", required=True, metavar="P", help="name in launch/profiles, or path of another profile"
    )
    parser.add_argument("--time", default="24:00:00", help="how long a job may take: H:MM:SS or D-HH:MM:SS (24:00:00)")
    parser.add_argument("--name", help="of the job (default: the name of the checkpoint directory)")
    parser.add_argument(
        "--output", type=path_name, metavar="FILE", help="job file (default: beside the checkpoint directory)"
    )
    parser.add_argument("--logs", type=path_name, metavar="DIR", help="folder of the logs (default: beside it too)")
    parser.add_argument("--submit", action="store_true", help="queue the job")
    _launch(parser.parse_args())


def _launch(arguments: argparse.Namespace) -> None:
    from megatron_ext.config import load_run
    from megatron_ext.config.load import raise_faults
    from megatron_ext.launching.check import check_job, file_faults, scheduler_away
    from megatron_ext.launching.job_file import SUBMIT, write_job
    from megatron_ext.launching.profile import read_profile
    from megatron_ext.model_io.starting_weights import open_hugging_face
    from megatron_ext.training.startup_checks import examine_run

    root = Path(__file__).resolve().parent.parent
    if not (root / "launch" / "templates").is_dir():
        raise ConfigError(
            f"{root} has no launch/templates: jobs are written by the tool of a checkout, not of a package"
        )
    profile = read_profile(arguments.profile, root / "launch" / "profiles")
    run = load_run(arguments.run, [*profile.overrides, *arguments.overrides])
    job = _job_of(arguments, profile, root, Path(run.checkpoint.directory).absolute())
    found = examine_run(run, arguments.run, open_hugging_face)
    steps = found.plan.total_steps if found.plan is not None else run.train.train_iters
    about_job = check_job(job, run, steps)
    for line in [*about_job.notes, *found.lines(), *(f"warning         {line}" for line in about_job.warnings)]:
        print(line)
    raise_faults(f"{arguments.run} on {arguments.nodes} nodes of {arguments.profile}", about_job.faults)
    write_job(job)
    away = scheduler_away(profile.scheduler)
    if complaints := list(file_faults(job, asks_scheduler=away is None)):
        raise ConfigError("\n".join([f"{job.file} was written, but would not run:", *complaints]))
    print(f"job file        {job.file}")
    command = [SUBMIT[profile.scheduler], str(job.file)]
    if away is not None:
        print(f"not asked       {away}: bash alone has read the file")
    if arguments.submit:
        _submit(command, away)
    else:
        print(f"queue it with   {' '.join(command)}{' on a machine of the cluster' if away is not None else ''}")


def _job_of(arguments: argparse.Namespace, profile: "Profile", root: Path, directory: Path) -> "Job":
    """The job that is asked for. What no option names goes by `directory`, that of the run's checkpoints."""
    from megatron_ext.launching.job_file import Job, parse_time

    return Job(
        run=Path(arguments.run).absolute(),
        overrides=arguments.overrides,
        profile=profile,
        profile_name=arguments.profile,
        nodes=arguments.nodes,
        seconds=parse_time(arguments.time),
        name=arguments.name or directory.name,
        logs=Path(arguments.logs or directory.with_name(f"{directory.name}-logs")).absolute(),
        root=root,
        place=Path.cwd(),
        python=Path(sys.executable),
        file=Path(arguments.output or directory.with_name(f"{directory.name}-job.sh")).absolute(),
    )


def _submit(command: list[str], away: str | None) -> None:
    if away is not None:
        raise ConfigError(
            f"--submit: {away}. The file is written and checked; on a machine of the cluster, or once it answers: "
            f"{' '.join(command)}"
        )
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"{' '.join(command)}: {done.stderr.strip()}")
    print(f"queued          {done.stdout.strip()}")


if __name__ == "__main__":
    run_command(main)
