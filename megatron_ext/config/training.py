"""How the model is trained: steps and batches, precision, optimizer, activation recompute."""

import datetime
from typing import Annotated, Literal

from pydantic import Field

from megatron_ext.config.base import Count, config


@config
class RampStep:
    """A smaller global batch at the beginning of a run."""

    global_batch_size: int = Field(ge=1)
    """Sequences an optimizer step."""
    steps: int | None = Field(default=None, ge=1)
    """For how many steps."""
    samples: Count | None = Field(default=None, ge=1)
    """For how many sequences, in place of steps."""

    @property
    def num_steps(self) -> int:
        """For how many steps, whichever says it."""
        return self.steps or (self.samples or 0) // self.global_batch_size


@config
class ExitAt:
    """Where a job ends before its run does.

    The step is finished and saved, and the exit code is 142, upon which a job script queues the run again. Of several
    the first counts. The same command goes on, with nothing changed.
    """

    iteration: int | None = Field(default=None, ge=1)
    """After this step. A job that begins there or beyond goes on to the end."""
    minutes: float | None = Field(default=None, gt=0)
    """When this job has run for so long, from the start of its launcher, with restarts."""
    time: str | float | int | None = None
    """At this time of rank 0's clock: ISO (2026-12-01T09:00+09:00; without a zone, local), or seconds since 1970."""
    minutes_before_limit: float | None = Field(default=None, ge=0)
    """So long before the time of the job is over, as Slurm says (SLURM_JOB_END_TIME), or MEGATRON_EXT_JOB_END, in
    seconds since 1970, where another scheduler's job file sets it. Give what a step and a checkpoint take."""

    @property
    def seconds(self) -> float | None:
        """`time` in seconds since 1970; ValueError where it is none."""
        if isinstance(self.time, str):
            return datetime.datetime.fromisoformat(self.time).timestamp()
        return self.time


@config
class TrainConfig:
    """Length of the run and shape of its batches."""

    train_iters: int = Field(default=0, ge=0)
    """Optimizer steps of the whole run, however many times it is interrupted. Learning rate and data follow it.
    Default: the steps of data.stages."""
    stop_at_iteration: int | None = Field(default=None, ge=1)
    """Save and end after this step, to go on later; the plan of the run stays what it is."""
    exit_at: ExitAt = Field(default_factory=ExitAt)
    """Save and end this job before the run is over, for the next job to go on."""
    global_batch_size: int = Field(ge=1)
    """Sequences an optimizer step."""
    batch_size_ramp: list[RampStep] = Field(default_factory=list)
    """Smaller global batches at the beginning, one after the other: [{global_batch_size: 16, steps: 10},
    {global_batch_size: 32, samples: 320}]. Their steps are steps of the run like any other."""
    micro_batch_size: int = Field(default=1, ge=1)
    """Sequences a forward pass on one data-parallel rank."""
    seed: int = Field(default=1234, ge=0, lt=2**31)
    """Seeds initial weights (by parameter name, so any layout starts alike), data order and dropout."""
    skip_steps: list[list[int]] = Field(default_factory=list)
    """Ranges [first, last] of steps that are passed over: nothing is computed, their samples count as consumed and the
    schedule goes on. The way past bad batches after going back to a checkpoint before them: [[1200, 1250]]."""
    skip_samples: list[list[Count]] = Field(default_factory=list)
    """The same by samples, counted from 0 over the run as reports number them: every step that would read one of
    [first, last] is passed over. `tools/train.py --skip-data FIRST:LAST` adds a range."""
    eval_interval: int | None = Field(default=None, ge=1)
    """Steps between validations. Unset: none. The last step is always validated when this is set."""
    eval_iters: int = Field(default=10, ge=1)
    """Global batches a validation."""


@config
class Fp32Precision:
    """Everything in 32-bit floating point."""

    kind: Literal["fp32"]


@config
class Bf16Precision:
    """bfloat16 weights and activations, fp32 master weights, gradients and optimizer state."""

    kind: Literal["bf16"]


@config
class Fp8Precision:
    """bf16 with the linear layers' matrix products in 8-bit floating point.

    Router, embeddings, norms and output layer stay in bf16, as do master weights, gradients and optimizer in fp32.
    """

    kind: Literal["fp8"]
    recipe: Literal["tensorwise", "rowwise", "delayed", "blockwise", "mxfp8"] = "tensorwise"
    """How tensors are scaled: by their own maximum, by each row's, by the maximum of past steps (delayed), by that of
    blocks of 128 x 128 and 1 x 128, or of 32 with powers of two (mxfp8)."""
    format: Literal["hybrid", "e4m3"] = "hybrid"
    """hybrid: e4m3 forward and e5m2 for gradients (of the torch backend's routed experts: e4m3); e4m3: everywhere."""
    num_layers_at_start_in_bf16: int = Field(default=0, ge=0)
    """First layers kept in bf16."""
    num_layers_at_end_in_bf16: int = Field(default=0, ge=0)
    """Last layers kept in bf16."""
    amax_history_len: int = Field(default=1024, ge=1)
    """With delayed: how many past steps' maxima are remembered."""
    amax_compute_algo: Literal["max", "most_recent"] = "max"
    """With delayed: the largest of them, or the latest."""
    margin: int = Field(default=0, ge=0)
    """With delayed: scales leave room for 2**margin times the maximum."""
    fp8_wgrad: bool = True
    """False: weight gradients are computed in bf16."""
    keep_fp8_weights: bool = True
    """The torch backend quantises each weight once a step and keeps it in both layouts until the update: 2 bytes a
    parameter. False: again in every forward and backward pass. Not one bit of the result differs."""


Precision = Annotated[Fp32Precision | Bf16Precision | Fp8Precision, Field(discriminator="kind")]


MomentDtype = Literal["fp32", "bf16"]


@config
class AdamConfig:
    """Adam with decoupled weight decay (AdamW); norms and biases are not decayed."""

    kind: Literal["adam"]
    lr: float = Field(gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of the first moment."""
    adam_beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of the second moment."""
    adam_eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""
    clip_grad: float = Field(default=1.0, ge=0)
    """Largest global gradient norm; 0 turns clipping off."""
    exp_avg_dtype: MomentDtype = "fp32"
    """Dtype in which the first moment is kept between steps; each step computes in fp32 (DeepSeek-V3, arXiv 2412.19437,
    section 3.3.3, keeps both in bf16). bf16 saves two bytes a parameter."""
    exp_avg_sq_dtype: MomentDtype = "fp32"
    """The same of the second moment."""
    moments_on_host: bool = False
    """Keep both moments in the host's page-locked memory, and bring them to the GPU a block at a time in each step."""

    @property
    def moment_bytes(self) -> int:
        """Bytes of both moments of a parameter."""
        return sum(4 if dtype == "fp32" else 2 for dtype in (self.exp_avg_dtype, self.exp_avg_sq_dtype))


Recomputable = Literal["core_attn", "mlp", "moe", "shared_experts", "layernorm", "moe_act"]


@config
class RecomputeConfig:
    """Which activations are recomputed in the backward pass, or kept in the host's memory, instead of on the device."""

    granularity: Literal["full", "selective"] | None = None
    """full: whole layers; selective: the modules named in `modules`; unset: nothing."""
    method: Literal["uniform", "block"] = "uniform"
    """With full: uniform recomputes all layers in chunks of `num_layers`, block the first `num_layers` of a stage."""
    num_layers: int = Field(default=1, ge=1)
    """With full: see `method`."""
    modules: list[Recomputable] = Field(default_factory=lambda: list[Recomputable](["core_attn"]))
    """With selective: the modules to recompute; moe_act with Transformer Engine only."""
    logits: bool = False
    """The output layer and the loss go through the vocabulary in parts, and the backward pass computes their logits
    again: there are never all logits in memory, for a fourth product of the output layer beside three. Whatever
    `granularity` says."""
    offload_layers: int = Field(default=0, ge=0)
    """Of each stage chunk, the first so many layers keep what they keep in the host's page-locked memory: it goes there
    while the next layer computes, and comes back during that layer's backward pass. Torch backend, on a GPU."""
    offload_min_bytes: int = Field(default=65536, ge=1)
    """With offload_layers: smaller tensors stay on the GPU, where a copy would take longer to begin than to end."""
