"""What the guard of a run will do by itself, in one line for people."""

from megatron_ext.config import RunConfig


def guard_line(run: RunConfig) -> str:
    """What happens to steps that go wrong; what would not happen is said too, with the key that turns it on."""
    guard, interval = run.guard, run.checkpoint.save_interval
    spikes, rollback, row = guard.spikes, guard.rollback, guard.max_nonfinite_in_row
    then = "ends the run" if rollback is None else "takes the run back"
    first = f"{row} steps in a row that are not finite are skipped, the next one {then}"
    parts = [first if row else f"a step that is not finite {then}"]
    if spikes is not None:
        parts.append(
            f"steps {spikes.sigma:g} sigma above the {spikes.window} before are skipped, at most {spikes.max_skips} of "
            "1,000"
        )
    if rollback is not None and interval is not None:
        back = rollback.min_steps_back
        parts.append(
            f"where the loss stays {rollback.sigma:g} sigma too high for {rollback.sustained_steps} steps it goes back "
            f"to a checkpoint {back:,} to {back + interval - 1:,} steps before, passes over the data since and warms "
            f"up over {rollback.rewarm_steps:,} steps; a second time within {rollback.horizon:,} steps ends it"
        )
    off = [key for key, on in (("guard.spikes", spikes), ("guard.rollback", rollback)) if on is None]
    if off:
        parts.append(f"off: {', '.join(off)} (long runs want both: {{}} turns each on)")
    return "; ".join(parts)
