"""Rules of the guard: what it goes by must be there when it is needed."""

import math

from megatron_ext.config.rules.registry import rule


@rule("guard.spikes.window", "guard.spikes.min_steps")
def _window_holds_enough(window: int, least: int) -> str | None:
    return "a window never holds so many; lower min_steps" if least > window + 1 else None


@rule(
    "guard.rollback.min_steps_back",
    "guard.rollback.sustained_steps",
    "checkpoint.save_interval",
    "checkpoint.keep_last",
    given=("guard.max_nonfinite_in_row", "checkpoint.keep_every"),
)
def _there_is_a_checkpoint_to_go_back_to(
    back: int, sustained: int, interval: int | None, keep: int | None, in_row: int, every: int | None
) -> str | None:
    if interval is None:
        return "there would be no checkpoint to go back to; set checkpoint.save_interval"
    needed = math.ceil((back + max(sustained, in_row + 1)) / interval) + 1
    if keep is not None and every is None and keep < needed:
        return (
            f"the checkpoint to go back to would be gone by then; set checkpoint.keep_last = {needed} or more, or "
            "checkpoint.keep_every"
        )
    return None
