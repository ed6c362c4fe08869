"""Figures of a comparison as people read them and as files keep them."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_ext.conversion.verify import LogitComparison, WeightComparison
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
    if not comparison.different:
        return [f"weights: all {comparison.tensors:,} tensors equal bit for bit"]
    names = ", ".join(comparison.different[:5])
    return [
        f"weights: {len(comparison.different):,} of {comparison.tensors:,} tensors differ, by up to "
        f"{comparison.largest_difference:.3g}: {names}"
    ]


def write_figures(path: str | Path, **comparisons: LogitComparison | WeightComparison) -> None:
    """Keep figures as JSON, one object a comparison."""
    content: dict[str, Any] = {name: asdict(comparison) for name, comparison in comparisons.items()}
    write_text(path, json.dumps(content, indent=2) + "\n")
