"""Figures of a comparison as people read them and as files keep them."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_ext.conversion.verify import LogitComparison, Verification, WeightComparison
from megatron_ext.files import write_text


def logit_lines(comparison: LogitComparison) -> list[str]:
    """Lines for the terminal."""
    c = comparison
    return [
        f"logits over {c.tokens:,} tokens:",
        f"  max |d|           {c.max_abs_difference:.3g}  ({c.relative:.1e} of the largest logit, {c.scale:.3g})",
        f"  argmax agreement  {c.argmax_agreement:.2%}",
        f"  mean KL           {c.mean_kl:.2e} nats",
    ]


def weight_lines(comparison: WeightComparison) -> list[str]:
    """Lines for the terminal."""
    rounded = f" after rounding to {', '.join(comparison.rounded_to)}" if comparison.rounded_to else ""
    if not comparison.different:
        return [f"weights: all {comparison.tensors:,} tensors equal bit for bit{rounded}"]
    names = ", ".join(comparison.different[:5])
    return [
        f"weights: {len(comparison.different):,} of {comparison.tensors:,} tensors differ{rounded}, by up to "
        f"{comparison.largest_difference:.3g}: {names}"
    ]


def lines_of(verification: Verification) -> list[str]:
    """Lines for the terminal."""
    logits = [] if verification.logits is None else logit_lines(verification.logits)
    fields = [f"configuration: {statement}" for statement in verification.fields]
    return [*fields, *weight_lines(verification.weights), *logits]


def write_figures(path: str | Path, **comparisons: LogitComparison | WeightComparison | None) -> None:
    """Keep figures as JSON, one object a comparison."""
    made = {name: asdict(comparison) for name, comparison in comparisons.items() if comparison is not None}
    content: dict[str, Any] = {
        name: {key: value for key, value in figures.items() if key != "rounded_to" or value}
        for name, figures in made.items()
    }
    write_text(path, json.dumps(content, indent=2) + "\n")
