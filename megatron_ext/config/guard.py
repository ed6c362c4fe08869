"""What the run does by itself when a step goes wrong."""

from pydantic import Field

from megatron_ext.config.base import config


@config
class GuardConfig:
    """What happens to steps that go wrong."""

    max_nonfinite_in_row: int = Field(default=3, ge=0)
    """A step whose loss or gradient is not finite is skipped on every rank before anything moves; its samples count as
    consumed. So many in a row are, the next one ends the run; 0: the first one does."""
