#!/usr/bin/env python
"""One training step of a small MoE model: our torch backend, megatron-core's local layers, Transformers' Qwen2-MoE.

python benchmarks/train_step.py               print the tables (about 10 minutes on 2 cores)
python benchmarks/train_step.py --record      and append them to benchmarks/RESULTS.md
python benchmarks/train_step.py --tiny        does it run? (a minute; the figures mean nothing)

Every peer trains the same model on 4096 tokens a step, in a process of its own. They take turns, one step each, so
that a busy machine slows all of them alike: compare ratios, not seconds. The machine's limit for matrix products is
measured in the same run, and those of this model take turns with the peers.
"""

import argparse
import os
import statistics

from gemm_limit import grouped_limit, model_limit, square_limit
from interleaving import Peer, Timing, take_turns
from report import hardware, markdown_table, record, versions
from train_step_peers import TINY, Size, megatron_core, megatron_ext, transformers_qwen2_moe

OURS, CORE, LIMIT = "megatron_ext", "megatron-core, local spec", "limit: products and attention alone"
COLUMNS = ["peer", "precision", "s/step", "tokens/s", "to Transformers' best", "in CPU s", "peak MiB", "first loss"]


def peers(precision: str, size: Size, threads: int) -> list[Peer]:
    """Everyone who trains in `precision`; ours first, the limit last."""
    common = {"size": size, "threads": threads}
    masters = "fp32" if precision == "fp32" else "bf16, fp32 masters and gradients"
    rivals = {"fp32": {"fp32": "fp32"}, "bf16": {"bf16": "pure bf16", "amp": "bf16 autocast of fp32 weights"}}
    return [
        Peer(OURS, megatron_ext, {**common, "precision": precision}, masters),
        Peer(CORE, megatron_core, {**common, "precision": precision}, masters),
        *(
            Peer(
                f"Transformers, {experts}{', autocast' if weights == 'amp' else ''}",
                transformers_qwen2_moe,
                {**common, "experts": experts, "weights": weights},
                note,
            )
            for weights, note in rivals[precision].items()
            for experts in ("eager", "grouped_mm")
        ),
        Peer(LIMIT, model_limit, {"size": size, "precision": precision}, precision),
    ]


def rows(contestants: list[Peer], timings: dict[str, Timing], size: Size) -> list[list[str]]:
    """One table row a peer; speed is the median over rounds of (Transformers' best / peer), also in CPU seconds."""
    rivals = [p.name for p in contestants if p.build is transformers_qwen2_moe and not timings[p.name].failure]
    best = min((timings[name] for name in rivals), key=lambda timing: timing.median)
    table = []
    for peer in contestants:
        timing = timings[peer.name]
        if timing.failure:
            table.append([peer.name, peer.note, f"failed: {timing.failure}", "", "", "", "", ""])
            continue
        ratio, cpu_ratio = (
            statistics.median(b / t for b, t in zip(getattr(best, kind), getattr(timing, kind), strict=True))
            for kind in ("seconds", "cpu_seconds")
        )
        figures = [f"{timing.median:.3f}", f"{size.tokens / timing.median:.0f}", f"{ratio:.2f}", f"{cpu_ratio:.2f}"]
        trained = [] if peer.name == LIMIT else [f"{timing.peak_bytes / 2**20:.0f}", f"{timing.first:.3f}"]
        table.append([peer.name, peer.note, *figures, *(trained or ["", ""])])
    return table


def machine_limits(threads: int, rounds: int) -> str:
    """GFLOP/s of one large product and of the experts' grouped one, in fp32 and bf16."""
    measured = [
        Peer(f"{name}, {precision}", build, {"precision": precision})
        for precision in ("fp32", "bf16")
        for name, build in (("2048 x 2048 x 2048", square_limit), ("grouped_mm 16 x 512 x 256 x 512", grouped_limit))
    ]
    timings = take_turns(measured, rounds=rounds, warmup=1, threads=threads)
    rates = [f"{name}: {timing.first / timing.median / 1e9:.0f}" for name, timing in timings.items()]
    return "Matrix products of this machine, GFLOP/s: " + "; ".join(rates) + "."


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--steps", type=int, default=12, metavar="N", help="timed steps of each peer (default 12)")
    parser.add_argument("--warmup", type=int, default=2, metavar="N", help="steps before, not timed (default 2)")
    parser.add_argument("--threads", type=int, default=cores, metavar="N", help="of each peer (default: all cores)")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="measure one only (default: both)")
    parser.add_argument("--peers", metavar="A,B", help="leave out peers whose name has none of these texts in it")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to see that it runs")
    parser.add_argument("--record", action="store_true", help="append the tables to benchmarks/RESULTS.md")
    return parser


def main() -> None:
    """Measure, print, record."""
    arguments = _parser().parse_args()
    size = TINY if arguments.tiny else Size()
    wanted = arguments.peers.split(",") if arguments.peers else [""]
    tables = []
    for precision in [arguments.precision] if arguments.precision else ["fp32", "bf16"]:
        contestants = [p for p in peers(precision, size, arguments.threads) if any(text in p.name for text in wanted)]
        timings = take_turns(contestants, rounds=arguments.steps, warmup=arguments.warmup, threads=arguments.threads)
        tables.append(markdown_table(COLUMNS, rows(contestants, timings, size)))
    text = "\n\n".join(
        [
            f"{hardware()}; {arguments.threads} threads. "
            + versions("torch", "megatron-core", "transformers")
            + f". {arguments.steps} steps of {size.tokens} tokens, taking turns.",
            *tables,
            machine_limits(arguments.threads, arguments.steps),
        ]
    )
    print(text)
    if arguments.record:
        record("Training step" + (" (tiny)" if arguments.tiny else ""), text)


if __name__ == "__main__":
    main()
