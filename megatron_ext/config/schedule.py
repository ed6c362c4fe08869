"""The learning rate over a run: warmup and decay, in steps, in tokens, or as stages of the data."""

from typing import Annotated, Literal

from pydantic import Field

from megatron_ext.config.base import Count, config


@config
class WarmupStage:
    """In place of warmup_iters: the peak is reached with the last step of a stage, the first one of the schedule."""

    stage: str
    """Its name in data.stages."""


@config
class LastStage:
    """In place of decay_iters: `min_lr` is reached with the last step of a stage."""

    stage: str
    """Its name in data.stages."""


@config
class DecayStage:
    """In place of wsd_decay_iters: the decay begins and ends with a stage."""

    stage: str
    """Its name in data.stages."""


@config
class Warmup:
    """What every schedule begins with: a straight line from 0 to the peak."""

    kind: str
    warmup_iters: int = Field(default=0, ge=0)
    """Steps from 0 to the peak."""
    warmup_tokens: Count | None = Field(default=None, ge=1)
    """The same in tokens, in place of warmup_iters."""
    warmup: WarmupStage | None = None
    """The same as the name of a stage."""


@config
class ConstantSchedule(Warmup):
    """Linear warmup, then the peak learning rate."""

    kind: Literal["constant"]


@config
class _Decaying(Warmup):
    """Warmup and a decay that sets in right after it."""

    decay_iters: int | None = Field(default=None, ge=1)
    """Step at which `min_lr` is reached. Default: the last one."""
    decay_tokens: Count | None = Field(default=None, ge=1)
    """Tokens at which `min_lr` is reached, in place of decay_iters."""
    decay: LastStage | None = None
    """The same as the name of a stage."""
    min_lr: float = Field(default=0.0, ge=0)
    """Final learning rate."""


@config
class LinearSchedule(_Decaying):
    """Linear warmup, then a straight line to `min_lr`."""

    kind: Literal["linear"]


@config
class CosineSchedule(_Decaying):
    """Linear warmup, then half a cosine to `min_lr`."""

    kind: Literal["cosine"]


@config
class WsdSchedule(Warmup):
    """Warmup, stable, decay (MiniCPM, arXiv 2404.06395, section 4): the peak is held until the final decay."""

    kind: Literal["wsd"]
    wsd_decay_iters: int | None = Field(default=None, ge=1)
    """Steps of the final decay, which ends with the last step. Without this and the two keys below there is none: the
    run stays open until a decay is added."""
    wsd_decay_tokens: Count | None = Field(default=None, ge=1)
    """The same in tokens, in place of wsd_decay_iters."""
    decay: DecayStage | None = None
    """The same as the name of a stage."""
    decay_style: Literal["linear", "cosine", "geometric", "exponential_megatron", "minus_sqrt", "exponential"] = (
        "minus_sqrt"
    )
    """Shape of the final decay over its share x: geometric divides the rate by the same factor at each step, to reach
    min_lr, lr * (min_lr / lr)**x; exponential_megatron is Megatron-LM's `exponential`, min_lr + (lr - min_lr) *
    (2 * 0.5**x - 1). `exponential` alone is refused: it has meant both."""
    min_lr: float = Field(default=0.0, ge=0)
    """Final learning rate."""


Schedule = Annotated[ConstantSchedule | LinearSchedule | CosineSchedule | WsdSchedule, Field(discriminator="kind")]
