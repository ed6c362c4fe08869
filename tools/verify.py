#!/usr/bin/env python
"""Compare two checkpoints, Megatron or Hugging Face: configuration, weights bit for bit, and logits on text.

  python tools/verify.py A B [--text corpus.jsonl]

Where one side stores its weights in a narrower dtype, both are compared in that one.
The Hugging Face one (B, where both are) also generates some tokens, with a cache and from padded prompts, which must be
the likeliest ones of the same model without both.
Exit code 1 if the configurations say another function, the weights differ, or the logits are further apart than
fp32 rounding explains, or other tokens are generated.
"""

from pydantic import Field

from megatron_ext.command import parse_command, run_command
from megatron_ext.config.base import PathName, config
from megatron_ext.errors import ConfigError


@config
class VerifyOptions:
    """Options of this command."""

    a: PathName
    """First checkpoint."""
    b: PathName
    """Second checkpoint."""
    logits: bool = True
    """Compare logits and generated tokens too: each model is loaded in fp32, one after the other. --no-logits leaves
    that out."""
    text: PathName | None = None
    """Text (.jsonl, .json, .txt, a folder) or the prefix of a prepared dataset. Default: built-in sentences."""
    tokenizer: PathName | None = None
    """Tokenizer for the text. Default: the checkpoint's own."""
    length: int = Field(default=128, ge=2)
    """Tokens a sequence."""
    batches: int = Field(default=4, ge=1)
    """Batches of two sequences."""
    tolerance: float = Field(default=1e-5, gt=0)
    """Largest difference of logits that counts as equal, as a share of the largest logit."""
    trust_remote_code: bool = False
    """Run modelling code inside a Hugging Face directory. Code that this framework shipped needs no trust."""
    figures: PathName | None = None
    """JSON file for the figures; written if both are the same model."""


def main() -> None:
    """Parse the command line and compare."""
    o = parse_command(VerifyOptions, __doc__, positional=["a", "b"])
    from megatron_ext.model_io.compare import Comparison, verify
    from megatron_ext.model_io.figures import lines_of, write_figures

    for name in ("text", "tokenizer", "trust_remote_code"):
        if getattr(o, name) and not o.logits:
            raise ConfigError(f"--{name.replace('_', '-')} is for the comparison of logits; leave out --no-logits")
    how = Comparison(o.logits, o.text, o.tokenizer, o.batches, o.length, o.tolerance, o.trust_remote_code)
    done = verify(o.a, o.b, how)
    print(*lines_of(done), sep="\n")
    if o.figures and done.passed:
        write_figures(o.figures, done)
    raise SystemExit(0 if done.passed else 1)


if __name__ == "__main__":
    run_command(main)
