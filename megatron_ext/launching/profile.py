"""What there is to know of a cluster: its nodes, its scheduler's options, environment, container and shared folders."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from megatron_ext.config import load_config, read_yaml
from megatron_ext.config.base import config
from megatron_ext.errors import ConfigError


@config
class Variable:
    """An environment variable of every rank, and why it is set."""

    name: str = Field(pattern=r"^[A-Za-z_]\w*$")
    """As the ranks see it."""
    value: str
    """Put into double quotes, so that $HOME and the like are those of the node the job begins on."""
    why: str = Field(min_length=1)
    """What it does, and where that is said; written above it in the job file."""


@config
class Container:
    """The image that the ranks run in."""

    kind: Literal["pyxis", "apptainer"]
    """pyxis: srun --container-image, by enroot (Slurm only); apptainer: `apptainer exec --nv` (singularity is one)."""
    image: str
    """A .sqsh or .sif file, or a name of a registry."""
    mounts: list[str] = Field(default_factory=list)
    """Folders that the image sees, as HERE or HERE:THERE."""
    python: str = "python3"
    """The Python of the image."""


@config
class Profile:
    """A cluster."""

    scheduler: Literal["slurm", "pbs", "age"]
    """Which template of launch/templates the job file is made of: Slurm, PBS Professional, Altair Grid Engine."""
    gpus_per_node: int = Field(ge=0)
    """0: processes_per_node ranks on CPU."""
    processes_per_node: int | None = Field(default=None, ge=1)
    """Default: gpus_per_node."""
    gpu_memory_gib: float | None = Field(default=None, gt=0)
    """Memory of a GPU, that the training state is held against."""
    peak_tflops: float | None = Field(default=None, gt=0)
    """Dense bf16 peak of a GPU, that the time is estimated from."""
    directives: list[str] = Field(default_factory=list)
    """The scheduler's options, a line each without #SBATCH; {nodes} and {time} are those of the job."""
    prepare: list[str] = Field(default_factory=list)
    """Lines of bash before the ranks start: modules, a virtual environment."""
    environment: list[Variable] = Field(default_factory=list)
    """Variables of the ranks: most are of the network between nodes."""
    container: Container | None = None
    """The image that the ranks run in. Default: none."""
    shared: list[str] = Field(default_factory=list)
    """Folders that every node sees: all paths of a run must be below one. Unset: paths on local disks are warned of."""
    longest_hours: float | None = Field(default=None, gt=0)
    """The longest job that the cluster takes."""
    minutes_before_limit: float = Field(default=10.0, gt=0)
    """So long before its time is over a job finishes its step, saves and ends: more than a checkpoint takes."""
    max_requeues: int = Field(default=100, ge=0)
    """How often the job queues itself again to go on; 0: never."""
    max_restarts: int = Field(default=0, ge=0)
    """How often torchrun starts the ranks again within a job after one of them failed."""
    node_test: bool = True
    """Test every node with tools/preflight.py before training starts."""
    overrides: list[str] = Field(default_factory=list)
    """section.key=value that each run gets on this cluster; those of the command line win."""

    @property
    def processes(self) -> int:
        """Ranks on a node."""
        return self.processes_per_node or self.gpus_per_node


def read_profile(name: str, folder: Path) -> Profile:
    """The profile at the path `name`, or of that name in `folder`.

    Raises:
        ConfigError: there is none, or it cannot be used as it is.
    """
    path = Path(name)
    if not name.endswith((".yaml", ".yml")):
        path = folder / f"{name}.yaml"
        if not path.is_file():
            there = ", ".join(sorted(found.stem for found in folder.glob("*.yaml")))
            raise ConfigError(f"--profile {name}: no such profile in {folder} ({there}), nor a path that ends in .yaml")
    profile = load_config(Profile, read_yaml(path), source=str(path))
    if not profile.processes:
        raise ConfigError(f"{path}: gpus_per_node = 0 needs processes_per_node")
    if profile.container is not None and profile.container.kind == "pyxis" and profile.scheduler != "slurm":
        raise ConfigError(f"{path}: container.kind = 'pyxis' is srun's, and scheduler = {profile.scheduler!r} has none")
    return profile
