#!/usr/bin/env python
"""Make a Mixture-of-Experts model out of a dense one or several, and measure whether it computes the same.

  python tools/upcycle.py DENSE TARGET --num-experts 8
  python tools/upcycle.py DENSE TARGET --num-experts 64 --topk 8 --method fine_grained --granularity 8
  python tools/upcycle.py CODE JAPANESE MATH TARGET --num-experts 6 --method mix
  python tools/upcycle.py DENSE TARGET --layers 0-23,8-31       # a deeper model; with --num-experts a MoE of it

DENSE and TARGET are Megatron checkpoints or Hugging Face directories (--to hf). --check prints the plan and writes
nothing. Beside a Megatron target stands a training configuration, TARGET.yaml.
"""

from megatron_ext.command import ending_on_sigterm, parse_command, prefer_huge_pages, run_command
from megatron_ext.upcycling.options import UpcycleOptions


def main() -> None:
    """Parse the command line, upcycle and check."""
    o = parse_command(UpcycleOptions, __doc__, positional=["sources", "target"])
    prefer_huge_pages()
    from megatron_ext.progress import byte_progress
    from megatron_ext.upcycling.describe import describe_plan
    from megatron_ext.upcycling.plan import make_plan
    from megatron_ext.upcycling.run import upcycle

    plan = make_plan(o)
    if o.check:
        print(describe_plan(plan))
        return
    with ending_on_sigterm(), byte_progress("upcycling") as progress:
        made = upcycle(plan, progress)
    experts = f"{o.method.kind}, {o.num_experts} experts" if o.num_experts else f"{plan.moe.num_layers} layers"
    print(f"{plan.options.target}: {experts}, {made.written.bytes / 1e6:,.1f} MB")
    print(f"function: {plan.expectation}")
    if made.function is not None:
        print(*made.function.lines(), sep="\n")
    if made.recipe is not None:
        print(f"training configuration: {made.recipe}", *made.notes, sep="\n  ")


if __name__ == "__main__":
    run_command(main)
