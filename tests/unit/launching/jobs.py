"""Jobs for tests: of any profile, for a small run."""

import sys
from pathlib import Path
from typing import Any

from megatron_ext.config import load_config
from megatron_ext.launching.job_file import Job
from megatron_ext.launching.profile import Profile
from tests.support.workspace import ROOT

PROFILES = ROOT / "launch" / "profiles"


def profile(**values: Any) -> Profile:
    return load_config(Profile, {"scheduler": "slurm", "gpus_per_node": 8, **values}, source="profile.yaml")


def job(directory: Path, cluster: Profile | None = None, **values: Any) -> Job:
    usual: dict[str, Any] = {
        "run": directory / "my run.yaml",
        "overrides": ["train.seed=7"],
        "profile": cluster or profile(),
        "profile_name": "mine",
        "nodes": 2,
        "seconds": 36 * 3600,
        "name": "moe",
        "logs": directory / "logs",
        "root": ROOT,
        "place": directory,
        "python": Path(sys.executable),
        "file": directory / "job.sh",
    }
    return Job(**(usual | values))
