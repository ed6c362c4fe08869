"""Where a run keeps its state, and the machine it runs on."""

from typing import Literal

from pydantic import Field

from megatron_ext.config.base import PathName, config

Backend = Literal["torch", "transformer_engine"]
Kernels = Literal["torch", "triton"]


@config
class CheckpointConfig:
    """Where training state is saved and continued from."""

    directory: PathName = Field(min_length=1)
    """Checkpoints are written here, by one run at a time. A run that finds a complete one here continues it."""
    save_interval: int | None = Field(default=None, ge=1)
    """Steps between checkpoints. Unset: only the last step is saved."""
    save_initial: bool = False
    """Save a new run before its first step too. That checkpoint stays."""
    keep_last: int | None = Field(default=None, ge=1)
    """Remove older checkpoints once this many newer ones are complete. The newest and the one before it are always kept
    (1 means 2), so that there is one to go back to where the newest is bad. Unset: keep all."""
    keep_every: int | None = Field(default=None, ge=1)
    """Steps: the checkpoints of its multiples stay, beside the newest of `keep_last`."""
    keep_matching: str | None = None
    """Regular expression: checkpoints whose whole step number it matches stay too, such as '(5|25)000'. So does what
    you rename: only directories called iter_ and a number are ever removed."""
    async_save: bool = True
    """Training waits only until its state is copied into the host's memory (weights and optimizer state of each rank),
    from where a thread writes it. Without room for the copy, and with False, it waits until everything is on disk."""
    copy_to: PathName | None = None
    """Second place: a directory, or any URL that fsspec opens (gs://, s3://; with its package installed). The newest
    checkpoint is copied there while training goes on, and kept there by the same rules. A run that finds a newer
    one there than in `directory` brings it back and continues it."""
    initialize_from: PathName | None = None
    """Megatron checkpoint or Hugging Face directory whose weights (not optimizer or position) a new run starts from, in
    any layout."""
    load_optimizer: bool = True
    """When continuing: False starts the optimizer afresh and keeps weights, step and data position. Adapters from
    PEFT have none, and start it afresh."""


@config
class WatchdogConfig:
    """Ends a run that no longer moves.

    With exit code 2, and every rank's stack in a file below `stalls/` of the checkpoint directory.
    """

    enabled: bool = True
    """False leaves it to wait, until a collective runs into distributed_timeout_minutes."""
    factor: float = Field(default=10.0, ge=2)
    """A step may take so many times the median of the last 32."""
    minimum_minutes: float = Field(default=5.0, gt=0)
    """But always so long."""
    first_step_minutes: float = Field(default=30.0, gt=0)
    """Each of the first three steps of a process may take so long, and what is no step (validation, saving) stand
    still for so long."""


@config
class RuntimeConfig:
    """The machine."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where there is one. CPU runs use Gloo, CUDA runs NCCL."""
    backend: Backend = "torch"
    """What layers are built from: plain PyTorch (CPU and CUDA), or NVIDIA Transformer Engine (CUDA)."""
    kernels: Kernels = "torch"
    """triton: the torch backend computes SwiGLU with routing weights, the sum of a token's experts, the loss, rotation,
    the residual sum with the norm after attention, and casts to FP8 each in one pass, by Triton kernels of its own
    (compute capability 8.0 or newer), and adds weight gradients to their fp32 sums within the product.
    Sums are rounded once, so the last bits differ. Off, since they have so far run in Triton's interpreter only, on no
    GPU: benchmarks/gpu_check shows on yours whether they are right, and how much faster."""
    compile_router: bool = False
    """What follows from a router's logits (scores, selection, weights, statistics of the losses) is one graph by
    torch.compile, a few kernels in place of dozens, compiled in the first step. Exponentials and sums are rounded
    otherwise, so the last bits differ. Off, since it has been compiled and compared on CPU only, and run on no GPU."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of one process. Default: OMP_NUM_THREADS, or the machine's cores over the local processes on CPU."""
    deterministic: bool = False
    """The same run computes the same bits again. On CUDA only kernels are used that add up in a fixed order, which is
    slower, and an operation that has none ends the run by name; on CPU it is so anyway."""
    watchdog: WatchdogConfig = Field(default_factory=WatchdogConfig)
    """Ends a run that no longer moves."""
    distributed_timeout_minutes: int = Field(default=10, ge=1, le=10**6)
    """A collective that takes longer ends the run."""
