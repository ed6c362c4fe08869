"""What looks at each checkpoint while a run goes on."""

from pydantic import Field

from megatron_ext.config.base import config


@config
class EvaluationConfig:
    """A command beside the run that evaluates its checkpoints, one at a time. Training never waits for it."""

    on_checkpoint: str | None = Field(default=None, min_length=1)
    """Shell command, started on the first rank's host for each checkpoint that is complete, with CHECKPOINT (its path),
    STEP and EVALUATION_DIRECTORY (a folder of its own) in its environment; `python` is the run's. Lines of its output
    that are JSON objects of numbers, {"name": 1.5}, join the metrics of that step. Unset: none. Ours: python
    tools/evaluate.py probe "$CHECKPOINT" --prompts prompts.jsonl --texts ja=ja.jsonl."""
    timeout_minutes: float = Field(default=120.0, gt=0)
    """After so long it is ended, and has failed."""
    keep_waiting: int = Field(default=2, ge=0)
    """So many checkpoints that wait for it, the newest, are not removed by checkpoint.keep_last. Older ones may go
    before their turn; that is told."""
