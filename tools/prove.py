#!/usr/bin/env python
"""Does the layout of a run train what one process trains? Answered on this machine's CPU, before a GPU is booked.

  python tools/prove.py RUN.yaml [section.key=value ...] [--world-size N]

The run is shrunk (same layers, experts, heads, router and features; small widths), trained for 5 steps in its layout on
Gloo processes and for 5 in one process, from the same weights; where its stages have other batches, sequence lengths or
rotary bases, for 3 steps of each. Exit code 1 if they differ.
"""

import sys

from megatron_ext.command import positive_integer, run_command, run_parser
from megatron_ext.config import load_run


def main() -> None:
    """Parse the command line and prove."""
    parser = run_parser(__doc__)
    parser.add_argument("--world-size", type=positive_integer, metavar="N", help="processes of the real run")
    parser.add_argument(
        "--processes", type=positive_integer, metavar="N", help="most to start here (default: what fits)"
    )
    arguments = parser.parse_args()
    run = load_run(arguments.run, arguments.overrides)
    from megatron_ext.proving.prove import TOLERANCE, plan_proof, processes_that_fit, prove

    plan = plan_proof(run, arguments.world_size, arguments.processes or processes_that_fit())
    steps = plan.cell.steps * len(plan.shapes)
    print(f"training {steps} steps on {plan.processes} processes, and {steps} on one")
    for number, shape in enumerate(plan.shapes if len(plan.shapes) > 1 else ()):
        first = number * plan.cell.steps + 1
        print(f"  steps {first} to {first + plan.cell.steps - 1} as in {shape}")
    for change in plan.changes:
        print(f"  smaller than the run: {change}")
    for left_out in plan.unproven:
        print(f"  not proven here: {left_out}")
    proof = prove(plan)
    print("  step          loss   on one process      gradient norm   on one process")
    rows = zip(proof.layout.losses, proof.single.losses, proof.layout.norms, proof.single.norms, strict=True)
    for step, (loss, single_loss, norm, single_norm) in enumerate(rows, start=1):
        print(f"  {step:4d}  {loss:12.7f}  {single_loss:15.7f}  {norm:17.7f}  {single_norm:15.7f}")
    loss, norm = proof.difference.loss, proof.difference.norm
    print(f"largest relative difference: loss {loss:.1e}, gradient norm {norm:.1e} (accepted: {TOLERANCE:.0e})")
    print(f"verdict: this layout {'trains what one process trains' if proof.holds else 'is NOT equal to one process'}")
    sys.exit(0 if proof.holds else 1)


if __name__ == "__main__":
    run_command(main)
