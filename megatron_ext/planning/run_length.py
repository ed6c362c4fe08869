"""How many tokens a run is planned to read, and in which kinds of steps: both decide how long it takes."""

from collections import Counter
from dataclasses import dataclass, replace

from megatron_ext.config import RunConfig
from megatron_ext.config.layout import StepShape
from megatron_ext.data.stream.plan import RunPlan
from megatron_ext.errors import ConfigError


@dataclass(frozen=True)
class RunLength:
    """Of a run from its beginning to its end."""

    tokens: float | None
    """None where it has stages whose sources do not say how many tokens they have."""
    kinds: tuple[tuple[int, float], ...]
    """Which of `RunConfig.step_shapes`, and its share of the tokens: the one with most of them first."""

    def usual(self, run: RunConfig) -> StepShape:
        """What the steps are like that most tokens are in."""
        return run.step_shapes[self.kinds[0][0]]


def run_length(run: RunConfig, plan: RunPlan | None = None) -> RunLength:
    """The length of `run`.

    Args:
        plan: of its data, where it has stages and they can be planned. Without one all is taken to be like its last.
    """
    shapes, tokens = run.step_shapes, Counter[int]()
    if plan is not None:
        sizes = [(shape.length, shape.size, shape.micro_size) for shape in shapes]
        for stage in plan.stages:
            size = (stage.sequence_length, stage.global_batch_size, stage.micro_batch_size)
            tokens[sizes.index(size)] += stage.tokens
    elif run.data.stages:
        return RunLength(None, ((len(shapes) - 1, 1.0),))
    else:
        for number, (step, shape) in enumerate(zip(run.train.batch_size_ramp, shapes, strict=False)):
            tokens[number] += step.num_steps * shape.size * shape.length
        tokens[len(shapes) - 1] = run.planned_samples * run.data.sequence_length - tokens.total()
    total = tokens.total()
    return RunLength(float(total), tuple((number, part / total) for number, part in tokens.most_common() if part > 0))


def with_tokens(run: RunConfig, length: RunLength, tokens: float) -> RunLength:
    """`length` with other `tokens` in the same kinds of steps.

    Raises:
        ConfigError: they are fewer than one step has.
    """
    usual = length.usual(run)
    if tokens < usual.size * usual.length:
        raise ConfigError(
            f"--tokens {tokens:g}: one step has {usual.size * usual.length:,} ({usual.size:,} x {usual.length:,})"
        )
    return replace(length, tokens=tokens)
