"""What the run does by itself when a step goes wrong."""

from pydantic import Field

from megatron_ext.config.base import config


@config
class SpikeConfig:
    """Single steps that stand out are skipped (the rule of OLMo-core's SkipStepOptimizer): {} turns it on."""

    window: int = Field(default=128, ge=2)
    """Steps before it that a step is compared with; those of its own data stage."""
    min_steps: int = Field(default=64, ge=2)
    """Nothing is skipped before there are so many, with the step itself."""
    sigma: float = Field(default=6.0, gt=0)
    """A step is skipped whose loss or gradient norm is so many standard deviations above the mean of the window."""
    max_skips: int = Field(default=5, ge=1)
    """Of 1000 steps no more are skipped; others that stand out are taken and reported."""


@config
class RollbackConfig:
    """Where the loss stays too high, or is not finite for too long, the run goes back to a checkpoint: {} turns it on.

    It takes weights and optimizer from there, passes over the data since then and warms the learning rate up again.
    """

    sustained_steps: int = Field(default=20, ge=1)
    """For so many steps in a row the running mean of the loss (decay 0.9) is above the mean of those before."""
    sigma: float = Field(default=6.0, gt=0)
    """By so many standard deviations of the 128 losses of this data stage that did not stand out, ..."""
    min_excess: float = Field(default=0.1, gt=0)
    """... and by no less than this."""
    min_steps_back: int = Field(default=100, ge=1)
    """The checkpoint is the newest one that is so many steps older than the first bad step."""
    pass_over_steps: int = Field(default=200, ge=1)
    """Steps after the checkpoint whose samples are passed over, at least up to where it was noticed, at most to the
    end of the data stage. As in train.skip_steps they count as consumed and the schedule goes on."""
    rewarm_steps: int = Field(default=100, ge=0)
    """Steps over which the learning rate then rises in a straight line to what the schedule says."""
    horizon: int = Field(default=2000, ge=1)
    """A second time within so many steps ends the run, with advice."""


@config
class GuardConfig:
    """What happens to steps that go wrong."""

    max_nonfinite_in_row: int = Field(default=3, ge=0)
    """A step whose loss or gradient is not finite is skipped on every rank before anything moves; its samples count as
    consumed. So many in a row are, the next one ends the run (with guard.rollback: the run goes back); 0: the first."""
    gradient_statistics_interval: int | None = Field(default=None, ge=1)
    """Every so many steps, the gradients of each layer and group of weights (embedding, norm, attention, mlp, router,
    experts, shared_experts, output) before clipping: norm, largest and mean magnitude, share of zeros. Unset: never."""
    spikes: SpikeConfig | None = None
    """Skip steps that stand out. Unset: none."""
    rollback: RollbackConfig | None = None
    """Go back where the run has gone wrong. Unset: never."""
