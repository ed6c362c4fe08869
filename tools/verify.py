#!/usr/bin/env python
"""Compare two checkpoints, Megatron or Hugging Face: weights bit for bit, and logits on text.

  python tools/verify.py A B [--text corpus.jsonl]

Exit code 1 if the weights differ or the logits are further apart than fp32 rounding explains.
"""

from pydantic import Field

from megatron_ext.command import parse_command, run_command
from megatron_ext.config.base import config


@config
class VerifyOptions:
    """Options of this command."""

    a: str
    """First checkpoint."""
    b: str
    """Second checkpoint."""
    text: str | None = None
    """Text (.jsonl, .txt, a folder) or the prefix of a prepared dataset. Default: built-in sentences."""
    tokenizer: str | None = None
    """Tokenizer for the text. Default: the checkpoint's own."""
    length: int = Field(default=128, ge=2)
    """Tokens a sequence."""
    batches: int = Field(default=4, ge=1)
    """Batches of two sequences."""
    tolerance: float = Field(default=1e-5, gt=0)
    """Largest difference of logits that counts as equal, as a share of the largest logit."""
    trust_remote_code: bool = False
    """Run modelling code inside a Hugging Face directory. Code that this framework shipped needs no trust."""
    figures: str | None = None
    """JSON file for the figures; written if both are the same model."""


def main() -> None:
    """Parse the command line and compare."""
    o = parse_command(VerifyOptions, __doc__, positional=["a", "b"])
    from megatron_ext.conversion.figures import logit_lines, weight_lines, write_figures
    from megatron_ext.conversion.text import comparison_batches
    from megatron_ext.conversion.verify import checkpoint_logits, compare_logits, compare_weights

    weights = compare_weights(o.a, o.b)
    batches = comparison_batches(o.a, o.text, o.tokenizer, batches=o.batches, length=o.length)
    a, b = (checkpoint_logits(path, batches, trust_remote_code=o.trust_remote_code) for path in (o.a, o.b))
    logits = compare_logits(a, b)
    print(*weight_lines(weights), *logit_lines(logits), sep="\n")
    same = not weights.different and logits.relative <= o.tolerance
    if o.figures and same:
        write_figures(o.figures, weights=weights, logits=logits)
    print("verdict: the same model" if same else "verdict: NOT the same model")
    raise SystemExit(0 if same else 1)


if __name__ == "__main__":
    run_command(main)
