"""Job files of every profile: bash reads them, every variable says why, and nothing of the run is lost on the way."""

import re
import subprocess
from pathlib import Path

import pytest

from megatron_ext.config import load_config
from megatron_ext.errors import ConfigError
from megatron_ext.launching.job_file import job_text, parse_time, write_job
from megatron_ext.launching.profile import Profile, read_profile
from tests.unit.launching.jobs import PROFILES, job, profile

NAMES = sorted(path.stem for path in PROFILES.glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_a_profile_makes_a_job_that_bash_reads(name: str, tmp_path: Path) -> None:
    cluster = read_profile(name, PROFILES)
    this = job(tmp_path, cluster, profile_name=name)
    write_job(this)
    checked = subprocess.run(["bash", "-n", this.file], capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")
    text = this.file.read_text()
    assert "{{" not in text
    assert f"'{this.run}' train.seed=7" in text
    assert re.search(r"^#(SBATCH --time=|PBS -l walltime=|\$ -l h_rt=)36:00:00$", text, re.MULTILINE)
    assert "142" in text, "exit_at would not queue it again"
    for variable in cluster.environment:
        assert f'# {variable.why}\nexport {variable.name}="{variable.value}"\n' in text
    head = (PROFILES / f"{name}.yaml").read_text().split("\nscheduler:")[0]
    assert re.search(r"[Nn]ot run ", head), "what was not tried is to be said"


def test_containers_stand_between_the_scheduler_and_the_ranks(tmp_path: Path) -> None:
    image = {"image": "/images/a.sqsh", "mounts": ["/data", "/x:/y"], "python": "/opt/bin/python"}
    seen = [{"name": "NCCL_NET", "value": "FasTrak", "why": "because"}]
    text = job_text(job(tmp_path, profile(container={"kind": "pyxis", **image}, environment=seen, shared=["/home"])))
    assert "--container-image=/images/a.sqsh" in text
    assert f"{tmp_path}/logs:{tmp_path}/logs,/home:/home,/data:/data,/x:/y --container-env=NCCL_NET" in text
    assert "PYTHON=/opt/bin/python" in text
    text = job_text(job(tmp_path, profile(scheduler="pbs", container={"kind": "apptainer", **image})))
    assert "apptainer exec --nv --bind" in text
    assert "--bind /data --bind /x:/y /images/a.sqsh " in text
    path = tmp_path / "profile.yaml"
    path.write_text("{scheduler: age, gpus_per_node: 4, container: {kind: pyxis, image: a}}")
    with pytest.raises(ConfigError, match="container.kind = 'pyxis' is srun's, and scheduler = 'age' has none"):
        read_profile(str(path), PROFILES)


def test_a_file_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    this = job(tmp_path)
    write_job(this)
    write_job(this)  # its own
    this.file.write_text("#!/bin/sh\n")
    with pytest.raises(ConfigError, match="was not written by this tool"):
        write_job(this)
    assert this.file.read_text() == "#!/bin/sh\n"


def test_times_and_profiles_that_are_none_are_named() -> None:
    assert [parse_time(text) for text in ("1:00:00", "2-03:00:30", "168:00:00")] == [3600, 183630, 604800]
    for text in ("90", "1:60:00", "4h"):
        with pytest.raises(ConfigError, match=f"--time {text}: expected HOURS:MM:SS"):
            parse_time(text)
    with pytest.raises(ConfigError, match=r"--profile gcp: no such profile in .*gcp_a3_high, gcp_a3_mega"):
        read_profile("gcp", PROFILES)
    with pytest.raises(ConfigError, match="environment.0.why: is required"):
        load_config(
            Profile,
            {"scheduler": "slurm", "gpus_per_node": 8, "environment": [{"name": "A", "value": "1"}]},
            source="p",
        )


@pytest.mark.parametrize(
    ("nodes", "together"),
    [
        ({0: 0, 1: 0}, 0),
        ({0: 143, 1: 143}, 143),
        ({0: 142, 1: 0}, 142),
        ({0: 1, 1: 143}, 1),  # node 1 was ended because node 0 failed
        ({0: 143, 1: 2}, 2),
        ({1: 143}, 143),  # node 0 was killed while it ended
        ({}, 137),  # all were: what the scheduler's starter said
    ],
)
def test_a_node_that_was_ended_for_another_is_no_run_that_was_saved(
    nodes: dict[int, int], together: int, tmp_path: Path
) -> None:
    for node, code in nodes.items():
        (tmp_path / f"exit-{node}").write_text(f"{code}\n")
    outcome = (PROFILES.parent / "templates" / "outcome.inc").read_text()
    script = f"set -euo pipefail\nlogs={tmp_path} NNODES=2 code=137\n{outcome}\noutcome\necho $code"
    said = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert (said.stdout, said.stderr) == (f"{together}\n", "")
    assert not list(tmp_path.iterdir())
