"""Does an upcycled model still compute what the dense one does? Measured on text, against what its method promises."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from megatron_ext.checkpoint.store import checkpoint_name
from megatron_ext.config import ModelConfig
from megatron_ext.conversion.logits import megatron_logits
from megatron_ext.conversion.verify import LogitComparison, compare_logits
from megatron_ext.errors import ConversionError
from megatron_ext.upcycling.method import Method

# fp32 rounding: the experts' outputs are weighted and added in another order than the dense layer's. Measured on models
# of 4 to 8 layers: 1e-7 to 1e-6 of the logits' scale.
TOLERANCE = 1e-5


def function_check(
    source: str | Path, target: str | Path, moe: ModelConfig, method: Method, batches: Sequence[Tensor]
) -> LogitComparison:
    """Compare the logits of the dense `source` and the upcycled `target`.

    Raises:
        ConversionError: `method` keeps the function of this model, and it was not kept; `target` is then set aside as
            `iter_0000000.refused`.
    """
    made = Path(target) / checkpoint_name(0)
    comparison = compare_logits(megatron_logits(source, batches), megatron_logits(made, batches))
    if method.inexact(moe) is None and comparison.relative > TOLERANCE:
        shutil.rmtree(aside := made.with_name(f"{made.name}.refused"), ignore_errors=True)
        made.rename(aside)
        raise ConversionError(
            f"{aside} does not compute what {source} does: logits differ by up to {comparison.max_abs_difference:.3g} "
            f"({comparison.relative:.1e} of their scale), though {method.name} should keep the function"
        )
    return comparison
