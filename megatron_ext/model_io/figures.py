"""Figures of a comparison as people read them and as files keep them."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_ext.files import write_text
from megatron_ext.model_io.compare import LogitComparison, Verification, WeightComparison
from megatron_ext.model_io.finite import describe
from megatron_ext.model_io.huggingface.cached_generation import GenerationComparison


def logit_lines(comparison: LogitComparison) -> list[str]:
    """Lines for the terminal."""
    c = comparison
    if math.isinf(c.max_abs_difference):
        return [f"logits over {c.tokens:,} tokens: NaN or infinite"]
    return [
        f"logits over {c.tokens:,} tokens:",
        f"  max |d|           {c.max_abs_difference:.3g}  ({c.relative:.1e} of the largest logit, {c.scale:.3g})",
        f"  argmax agreement  {c.argmax_agreement:.2%}",
        f"  mean KL           {c.mean_kl:.2e} nats",
        *(
            [f"  experts           in {c.ties} rows rounding decides which are taken, and was followed"]
            if c.ties
            else []
        ),
    ]


def weight_lines(comparison: WeightComparison) -> list[str]:
    """Lines for the terminal."""
    rounded = f" after rounding to {', '.join(comparison.rounded_to)}" if comparison.rounded_to else ""
    lines = []
    if comparison.not_finite:
        lines.append(f"weights: {describe(comparison.not_finite, comparison.tensors)}; take a checkpoint from before")
    if not comparison.different:
        return [*lines, f"weights: all {comparison.tensors:,} tensors equal bit for bit{rounded}"]
    names = ", ".join(comparison.different[:5])
    apart = f", by up to {comparison.largest_difference:.3g}" if comparison.largest_difference else ""
    lines.append(
        f"weights: {len(comparison.different):,} of {comparison.tensors:,} tensors differ{rounded}{apart}: {names}"
    )
    return lines


def generation_lines(comparison: GenerationComparison) -> list[str]:
    """Lines for the terminal."""
    c = comparison
    short = f", the others up to {c.relative:.1e} of the largest logit below it" if c.same < c.tokens else ""
    return [f"generation: {c.same} of {c.tokens} tokens with a cache and padding are the likeliest without{short}"]


def lines_of(verification: Verification) -> list[str]:
    """Lines for the terminal; the last one says what follows from the others."""
    v = verification
    return [
        *(f"configuration: {statement}" for statement in v.fields),
        *weight_lines(v.weights),
        *([] if v.logits is None else logit_lines(v.logits)),
        *([] if v.generation is None else generation_lines(v.generation)),
        *([f"generation: not compared, {v.why_not_generated}"] if v.why_not_generated else []),
        f"verdict: {verdict(v)}",
    ]


def verdict(verification: Verification) -> str:
    """What follows from a verification, in words."""
    v = verification
    if v.weights.not_finite and not v.weights.different:
        return "no model: its weights are no numbers"
    if not v.same:
        return "NOT the same model"
    if v.generates:
        return "the same model"
    import transformers  # loaded already, where something was generated

    return (
        f"the same model, but with a cache it generates other tokens than it computes, under transformers "
        f"{transformers.__version__}: NOT to be used"
    )


def write_figures(path: str | Path, verification: Verification) -> None:
    """Keep figures as JSON: one object a comparison, and `verification` with what follows from them."""
    v = verification
    comparisons = {"weights": v.weights, "logits": v.logits, "generation": v.generation}
    made = {name: asdict(comparison) for name, comparison in comparisons.items() if comparison is not None}
    content: dict[str, Any] = {
        name: {key: value for key, value in figures.items() if key not in ("rounded_to", "not_finite", "ties") or value}
        for name, figures in made.items()
    }
    content["verification"] = {"verdict": verdict(v)}
    write_text(path, json.dumps(content, indent=2) + "\n")
