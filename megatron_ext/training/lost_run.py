"""A directory in which a run has been whose checkpoints are gone: no place where a new run begins by itself."""

from pathlib import Path

from megatron_ext.checkpoint.publish import unfinished_saves
from megatron_ext.errors import CheckpointError
from megatron_ext.monitoring.metrics_file import read_history


def begins_anew(directory: Path, metrics: Path) -> str | None:
    """What to say of a new run in `directory`, which has no checkpoint, about a save there that was ended.

    A run that is ended within its first save has lost the steps before it and nothing else: when it is started again,
    by hand or by a launcher, it begins anew. That it was the first is known from the run's own reports.

    Args:
        metrics: the run's metrics file.

    Raises:
        CheckpointError: by its reports the run had checkpoints.
    """
    left = unfinished_saves(directory)
    if not left:
        return None
    events = read_history(metrics).events if metrics.is_file() else []
    saved = [event for event in events if event["event"] == "checkpoint"]
    if saved:
        raise CheckpointError(
            f"{directory} has {left[-1].name}, a save that was ended, and no checkpoint, but by {metrics} there was "
            f"one of step {saved[-1]['iteration']}. Bring it back, or start anew in another directory or after "
            f"removing {', '.join(path.name for path in left)}"
        )
    return f"its first save was ended ({left[-1].name}): nothing else was lost, and it begins anew"
