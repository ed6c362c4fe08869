"""What is reported of each source of the data: its loss, and how much of it was read."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_ext.planning.amounts import short_number

if TYPE_CHECKING:  # sinks need neither torch nor megatron
    from megatron_ext.data.stream.position import Consumption

_MOST_ON_A_LINE = 4


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


def perplexity(loss: float) -> float:
    """The exponential of a loss: among how many tokens, equally likely, one would guess as well."""
    return math.exp(loss) if loss < 700 else math.inf


def step_values(sources: Mapping[str, SourceReport]) -> dict[str, Any]:
    """For the metrics file, by source."""
    return {name: dict(vars(source)) for name, source in sources.items()}


def step_panels(sources: Mapping[str, SourceReport]) -> dict[str, float]:
    """For W&B, by panel."""
    values = {f"sources/{key}/{name}": value for name, source in sources.items() for key, value in vars(source).items()}
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
    return {name: {"loss": loss, "perplexity": perplexity(loss)} for name, loss in report.sources.items()}


def validation_panels(report: ValidationReport) -> dict[str, float]:
    """For W&B, by panel."""
    panels = {"validation/loss": report.loss, "validation/perplexity": perplexity(report.loss)}
    for name, loss in report.sources.items():
        panels |= {f"validation/loss/{name}": loss, f"validation/perplexity/{name}": perplexity(loss)}
    return panels


def validation_line(report: ValidationReport) -> str:
    """For the console: loss and perplexity, in all and of each source."""
    parts = [f"validation loss {report.loss:.4f}, perplexity {perplexity(report.loss):.4g}"]
    if len(report.sources) > 1:
        each = (f"{name} {loss:.4f} ({perplexity(loss):.4g})" for name, loss in report.sources.items())
        parts.append(", ".join(each))
    return " | ".join(parts)
