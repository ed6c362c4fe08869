#!/usr/bin/env python
"""Add trained adapters (LoRA) to the weights beside which they were trained.

  python tools/merge_lora.py runs/sft merged --dtype fp32
  python tools/merge_lora.py runs/dpo chat --to hf --dtype bf16

One process, a few tensors in memory. The base is read from where the run had it, or from --base, and must hold the very
weights of the run. Sums are computed in fp32; where they are stored in bf16, the command says what share of the change
is lost by that. No adapters are merged twice.
"""

from megatron_ext.command import ending_on_sigterm, parse_command, prefer_huge_pages, run_command
from megatron_ext.merging.lora_options import MergeLoraOptions


def main() -> None:
    """Parse the command line and merge."""
    o = parse_command(MergeLoraOptions, __doc__, positional=["adapters", "target"])
    prefer_huge_pages()
    from megatron_ext.merging.lora import MUCH, merge_lora
    from megatron_ext.progress import byte_progress

    with ending_on_sigterm():
        made = merge_lora(o, byte_progress)
    print(f"{o.target}: {made.pairs:,} adapters added to {made.base}, {made.written.bytes / 1e6:,.1f} MB")
    for kind, share in made.losses.items():
        print(f"  lost by rounding {share:8.2%}  {kind}")
    if made.worst > MUCH:
        print(
            f"warning: rounding has lost up to {made.worst:.0%} of what the adapters change; merge with --dtype fp32 "
            "where training goes on, or to compare"
        )


if __name__ == "__main__":
    run_command(main)
