"""What a run reports, how often and to where: console, metrics file, TensorBoard, Weights & Biases."""

from typing import Literal

from pydantic import Field

from megatron_ext.config.base import PathName, config


@config
class WandbConfig:
    """Weights & Biases. A resumed run continues the same W&B run; a failing network never stops training."""

    mode: Literal["off", "offline", "online"] = "off"
    """offline writes to `directory` for a later `wandb sync`; online does so too where there is no network at the
    start, and keeps what it cannot send where it goes away later."""
    project: str = "megatron_ext"
    """W&B project."""
    entity: str | None = None
    """W&B user or team."""
    name: str | None = None
    """Display name. Default: the checkpoint directory's name."""
    group: str | None = None
    """Runs of one group stand together in W&B, such as the runs of one sweep."""
    tags: list[str] = Field(default_factory=list)
    """Words to find the run by in W&B."""
    directory: PathName | None = None
    """Where W&B keeps its files. Default: the checkpoint directory."""


@config
class LoggingConfig:
    """What is reported, and how often."""

    log_interval: int = Field(default=1, ge=1)
    """Steps between reports. Of a step that nobody reports, the loss alone is read from the device, for the guard."""
    log_interval_seconds: float | None = Field(default=None, gt=0)
    """Report about this often, and never oftener than every log_interval steps. Every report says, by the pace of the
    slowest rank since the last one, at which step the next is due, so that all ranks agree without asking."""
    console: bool = True
    """Whether steps and validations are shown: aligned columns on a terminal, `key value` pairs elsewhere. What happens
    to a run besides is always said."""
    metrics_file: PathName | None = None
    """JSONL file of all metrics. Default: metrics.jsonl in the checkpoint directory."""
    tensorboard_directory: PathName | None = None
    """TensorBoard's event files are written here, by one run. Unset: none. Needs the extra `tensorboard`."""
    peak_tflops: float | None = Field(default=None, gt=0)
    """Dense peak of one device in TFLOP/s, from which model FLOPs utilisation (MFU) is reported. Default: the bf16 peak
    of the GPU by its name, where it is known; none for fp32 and on CPU."""
    wandb: WandbConfig = Field(default_factory=WandbConfig)
    """Weights & Biases."""
