"""What is reported of each source of the data: its loss, and how much of it was read."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megatron_ext.planning.amounts import short_number

if TYPE_CHECKING:  # sinks need neither torch nor megatron
    from megatron_ext.data.stream.position import Consumption

_MOST_ON_A_LINE = 4
ACCURACY, MARGIN = "rewards/accuracies", "rewards/margins"
"""Of pairs, the share whose chosen answer has the larger reward, and the mean of how much larger it is."""


@dataclass(frozen=True)
class SourceReport:
    """One source, since the report before."""

    loss: float | None
    """Mean over the tokens that counted; None where none did."""
    supervised_tokens: float
    """Tokens that counted, a step."""
    consumed_tokens: int
    """Read of it since the run began."""
    epochs: float
    """How often that is the whole source."""


@dataclass(frozen=True)
class ValidationReport:
    """A validation: the loss over all its samples, and over those of each source."""

    loss: float
    sources: Mapping[str, float]
    others: Mapping[str, float] = field(default_factory=dict)
    """What else the task sums up, by name."""
    has_perplexity: bool = True
    """Whether the loss is a mean cross-entropy."""


def perplexity(loss: float) -> float:
    """The exponential of a loss: among how many tokens, equally likely, one would guess as well."""
    return math.exp(loss) if loss < 700 else math.inf


def step_values(sources: Mapping[str, SourceReport]) -> dict[str, Any]:
    """For the metrics file, by source."""
    return {name: dict(vars(source)) for name, source in sources.items()}


def step_panels(sources: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """For W&B, by panel, of what `step_values` gives."""
    values = {f"sources/{key}/{name}": value for name, source in sources.items() for key, value in source.items()}
    return {key: value for key, value in values.items() if value is not None}


def step_line(sources: Mapping[str, SourceReport], steps: int) -> str:
    """For the console: the losses over some steps of those that most tokens were of; empty with only one source."""
    if len(sources) < 2:
        return ""
    losses = {name: source.loss for name, source in sources.items() if source.loss is not None}
    most = sorted(losses, key=lambda name: -sources[name].supervised_tokens)[:_MOST_ON_A_LINE]
    shown = [f"{name} {loss:.3f}" for name, loss in losses.items() if name in most]
    left_out = len(losses) - len(shown)
    over = f"{steps} steps: " if steps > 1 else ""
    return over + ", ".join(shown) + (f" and {left_out} more" if left_out else "")


def consumption_line(consumption: "Consumption") -> str:
    """For the console: how much was read of each source since the run began."""
    read = consumption.sources.items()
    return ", ".join(f"{name} {short_number(use.tokens)} tokens ({use.epochs:.3g} epochs)" for name, use in read)


def validation_values(report: ValidationReport) -> dict[str, Any]:
    """For the metrics file, by source."""
    return {name: _with_perplexity("loss", loss, report) for name, loss in report.sources.items()}


def validation_record(iteration: int, report: ValidationReport) -> dict[str, Any]:
    """The line of the metrics file."""
    others = {f"validation_{name}": value for name, value in report.others.items()}
    return {"iteration": iteration, "validation_loss": report.loss, "sources": validation_values(report), **others}


def recorded_validation(record: Mapping[str, Any]) -> ValidationReport:
    """The inverse of `validation_record`."""
    sources = record["sources"]
    prefix = "validation_"
    others = {name.removeprefix(prefix): value for name, value in record.items() if name.startswith(prefix)}
    return ValidationReport(
        others.pop("loss"),
        {name: values["loss"] for name, values in sources.items()},
        others,
        has_perplexity=all("perplexity" in values for values in sources.values()),
    )


def _with_perplexity(name: str, loss: float, report: ValidationReport) -> dict[str, float]:
    """A loss under its name, and its perplexity if it has one under the name with that word in the place of `loss`."""
    found = {name: loss}
    if report.has_perplexity:
        found[name.replace("loss", "perplexity", 1)] = perplexity(loss)
    return found


def validation_panels(report: ValidationReport) -> dict[str, float]:
    """For W&B, by panel."""
    panels = _with_perplexity("validation/loss", report.loss, report)
    for name, loss in report.sources.items():
        panels |= _with_perplexity(f"validation/loss/{name}", loss, report)
    return panels | {f"validation/{name}": value for name, value in report.others.items()}


def validation_line(report: ValidationReport) -> str:
    """For the console: loss and perplexity, in all and of each source; of pairs how many are told apart."""
    said = f", perplexity {perplexity(report.loss):.4g}" if report.has_perplexity else ""
    parts = [f"validation loss {report.loss:.4f}{said}"]
    if len(report.sources) > 1:
        each = (
            f"{name} {loss:.4f}" + (f" ({perplexity(loss):.4g})" if report.has_perplexity else "")
            for name, loss in report.sources.items()
        )
        parts.append(", ".join(each))
    return " | ".join(filter(None, [*parts, pairs_line(report.others)]))


def pairs_line(values: Mapping[str, float]) -> str:
    """For the console: of preference optimisation the share of pairs told apart and by how much; otherwise empty."""
    if ACCURACY not in values:
        return ""
    return f"accuracy {values[ACCURACY]:.3f}, margin {values[MARGIN]:+.3f}"
