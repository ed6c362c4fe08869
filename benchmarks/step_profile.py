#!/usr/bin/env python
"""Where the time of our training step goes, by kind of work.

python benchmarks/step_profile.py                       fp32 and bf16, all cores
python benchmarks/step_profile.py --threads 1 --record  and append the table to benchmarks/RESULTS.md

The same model and step as benchmarks/train_step.py. Several steps are profiled one by one, and of each operation the
fastest step counts: what another process took from one step is not in the table.
"""

import argparse
import multiprocessing
import os
from collections import defaultdict
from typing import Literal

from report import hardware, markdown_table, record, versions
from train_step_peers import TINY, Size, megatron_ext

KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm"),
    "attention, forward and backward": ("aten::_scaled_dot_product",),
    "copies, fills, concatenations": ("aten::copy_", "aten::fill_", "aten::cat", "aten::zero_"),
    "sorting tokens, embedding": ("aten::index", "aten::scatter", "aten::gather", "aten::nonzero", "aten::embedding"),
    "optimizer and gradient norm": ("aten::_fused_adamw_", "aten::linalg_vector_norm", "aten::_foreach"),
    "communication with itself": ("c10d::", "gloo:"),
}
ELEMENTWISE, REST = "elementwise and reductions", "views, autograd, Python"
_VIEWS = (
    "as_strided slice select view transpose t detach empty empty_strided empty_like narrow expand reshape permute "
    "to _to_copy contiguous clone chunk split unsqueeze squeeze alias linear matmul item"
).split()


def kind_of(operation: str) -> str:
    """The kind of work that the profiler's `operation` is."""
    for kind, prefixes in KINDS.items():
        if operation.startswith(prefixes):
            return kind
    is_compute = operation.startswith("aten::") and operation.removeprefix("aten::") not in _VIEWS
    return ELEMENTWISE if is_compute else REST


def milliseconds(size: Size, precision: Literal["fp32", "bf16"], threads: int, steps: int) -> dict[str, float]:
    """Own time of each kind of work in one step."""
    from torch.profiler import ProfilerActivity, profile

    step = megatron_ext(size, precision, threads)
    for _ in range(2):
        step()
    fastest: dict[str, float] = defaultdict(lambda: float("inf"))
    for _ in range(steps):
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            step()
        for event in profiler.key_averages():
            fastest[event.key] = min(fastest[event.key], event.self_cpu_time_total / 1e3)
    total: dict[str, float] = defaultdict(float)
    for operation, own in fastest.items():
        total[kind_of(operation)] += own
    return dict(total)


def main() -> None:
    """Profile, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), metavar="N", help="CPU threads")
    parser.add_argument("--steps", type=int, default=6, metavar="N", help="profiled steps (default 6)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to see that it runs")
    parser.add_argument("--record", action="store_true", help="append the table to benchmarks/RESULTS.md")
    arguments = parser.parse_args()
    size = TINY if arguments.tiny else Size()
    context = multiprocessing.get_context("spawn")
    measured = {}
    for precision in ("fp32", "bf16"):
        with context.Pool(1) as pool:  # megatron-core's groups are set up once a process
            measured[precision] = pool.apply(milliseconds, (size, precision, arguments.threads, arguments.steps))
    rows = [
        [kind, *(f"{ms.get(kind, 0):.0f} ({ms.get(kind, 0) / sum(ms.values()):.0%})" for ms in measured.values())]
        for kind in (*KINDS, ELEMENTWISE, REST)
    ]
    rows.append(["sum", *(f"{sum(ms.values()):.0f}" for ms in measured.values())])
    text = (
        f"{hardware()}; {arguments.threads} threads. {versions('torch', 'megatron-core')}. Milliseconds a step of "
        f"{size.tokens} tokens.\n\n{markdown_table(['work', 'fp32', 'bf16'], rows)}"
    )
    print(text)
    if arguments.record:
        record("Profile of the training step" + (" (tiny)" if arguments.tiny else ""), text)


if __name__ == "__main__":
    main()
