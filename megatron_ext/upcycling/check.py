"""Does an upcycled model still compute what the dense one does? Measured on text, against what its method promises."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from megatron_ext.conversion.figures import logit_lines
from megatron_ext.conversion.verify import LogitComparison, checkpoint_logits, compare_logits, perplexity
from megatron_ext.errors import ConversionError
from megatron_ext.upcycling.upcycle import Plan


@dataclass(frozen=True)
class FunctionCheck:
    """How far the MoE model's function is from the dense one's."""

    logits: LogitComparison
    dense_perplexity: float
    moe_perplexity: float

    def figures(self) -> dict[str, float]:
        """As files keep them."""
        perplexities = {"dense_perplexity": self.dense_perplexity, "moe_perplexity": self.moe_perplexity}
        return {**asdict(self.logits), **perplexities}

    def lines(self) -> list[str]:
        """Lines for the terminal."""
        return [
            *logit_lines(self.logits),
            f"  perplexity        {self.dense_perplexity:.4g} dense, {self.moe_perplexity:.4g} MoE",
        ]


def function_check(plan: Plan, made: Path, batches: Sequence[Tensor]) -> FunctionCheck:
    """Compare the logits of the first source and of the upcycled model at `made`.

    They differ by fp32 rounding: experts' outputs are weighted and added in another order than the dense layer's.
    Models of 4 to 8 layers measured 1e-7 to 1e-6 of the logits' scale.

    Raises:
        ConversionError: the function should be kept, and it was not.
    """
    dense, moe = (checkpoint_logits(path, batches) for path in (plan.opened[0].directory, made))
    comparison = compare_logits(dense, moe)
    if plan.inexact is None and comparison.relative > plan.options.tolerance:
        raise ConversionError(
            f"{plan.options.target}: not written, it does not compute what {plan.opened[0].directory} does: logits "
            f"differ by up to {comparison.max_abs_difference:.3g} ({comparison.relative:.1e} of their scale), though "
            f"{plan.method.kind} should keep the function"
        )
    return FunctionCheck(comparison, perplexity(dense, batches), perplexity(moe, batches))
