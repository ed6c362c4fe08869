"""How many checkpoints a run still adds to those that stand in its directory."""

import math

from megatron_ext.config import CheckpointConfig


def checkpoints_to_come(settings: CheckpointConfig, steps_left: int, kept: int) -> int:
    """The most that will stand there beside the `kept` that do, at any time of the `steps_left` steps."""
    if steps_left <= 0:
        return 0
    saves = math.ceil(steps_left / settings.save_interval) if settings.save_interval else 1
    if settings.keep_last is None:
        return saves
    # An old one goes once a newer one is complete, so that one more than keep_last stand there for a moment.
    stays = steps_left // settings.keep_every if settings.keep_every else 0
    return max(min(settings.keep_last + 1 - kept + stays, saves), 1)
