#!/usr/bin/env python
"""Make a Mixture-of-Experts checkpoint out of a dense one, and measure whether it computes the same.

python tools/upcycle.py DENSE_CHECKPOINT TARGET --num-experts 8
"""

from megatron_ext.command import parse_command, run_command
from megatron_ext.upcycling.options import UpcycleOptions


def main() -> None:
    """Parse the command line, upcycle and check."""
    o = parse_command(UpcycleOptions, __doc__, positional=["source", "target"])
    from megatron_ext.conversion.checkpoint_model import read_model
    from megatron_ext.conversion.figures import logit_lines, write_figures
    from megatron_ext.conversion.text import comparison_batches
    from megatron_ext.progress import byte_progress
    from megatron_ext.upcycling.check import function_check
    from megatron_ext.upcycling.upcycle import METHODS, upcycle

    moe, method = o.moe_model(read_model(o.source)), METHODS[o.method]
    batches = comparison_batches(o.source, o.text, o.tokenizer)
    with byte_progress("upcycling") as progress:
        upcycle(o.source, o.target, moe, method, seed=o.seed, force=o.force, progress=progress)
    comparison = function_check(o.source, o.target, moe, method, batches)
    expected = method.inexact(moe) or "the function is kept"
    print(
        f"{o.target}: {o.method}, {moe.num_moe_experts} experts; expected: {expected}",
        *logit_lines(comparison),
        sep="\n",
    )
    if o.figures:
        write_figures(o.figures, upcycling=comparison)


if __name__ == "__main__":
    run_command(main)
