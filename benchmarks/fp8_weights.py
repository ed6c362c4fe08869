#!/usr/bin/env python
"""What it saves on CPU to quantise weights once a step: CPU seconds of a step with and without, by recipe.

python benchmarks/fp8_weights.py               print the table (some minutes)
python benchmarks/fp8_weights.py --record      and append it to benchmarks/RESULTS.md
python benchmarks/fp8_weights.py --tiny        does it run? (the figures mean nothing)

Both ways take turns, a step each, in one process and one thread; the losses of every step must be the same bits.
"""

import argparse
import statistics
import time
from typing import Any

from report import hardware, markdown_table, record, versions

RECIPES = ("tensorwise", "rowwise", "delayed", "blockwise", "mxfp8")
COLUMNS = ["recipe", "micro-batches", "CPU s a step, quantised in each", "once a step", "saved"]


def seconds_of(recipe: str, micro_batches: int, steps: int, tiny: bool) -> list[list[float]]:
    """CPU seconds of each step: of those that quantise in each micro-batch, and of those that do it once."""
    from megatron.core.parallel_state import destroy_model_parallel

    from megatron_ext.config import Fp8Precision, ParallelConfig
    from megatron_ext.mcore.build import build_trainable
    from megatron_ext.proving.parity import Cell
    from megatron_ext.runtime.device import choose_device
    from megatron_ext.runtime.process_groups import split_process_group
    from megatron_ext.testing.tiny import random_batch, tiny_model
    from megatron_ext.training.step import train_step
    from megatron_ext.training.tasks.pretrain import Pretrain

    wide: dict[str, Any] = {} if tiny else {"hidden_size": 512, "ffn_hidden_size": 1536, "moe_ffn_hidden_size": 512}
    model, length = tiny_model(moe=True, num_layers=2, max_position_embeddings=256, **wide), 32 if tiny else 256
    shape = {"samples": micro_batches, "micro_batch": 1, "length": length}
    cells = [
        Cell(model, ParallelConfig(), Fp8Precision(kind="fp8", recipe=recipe, keep_fp8_weights=keeps), **shape)
        for keeps in (False, True)
    ]
    device = choose_device(cells[0].runtime)
    groups = split_process_group(cells[0].parallel, cells[0].runtime)
    built = [build_trainable(cell, groups, device) for cell in cells]
    seconds: list[list[float]] = [[], []]
    for step in range(steps + 1):
        batch = random_batch(step, dp_rank=0, dp_size=1, vocabulary=model.vocab_size, **shape)
        losses = []
        for trainable, taken in zip(built, seconds, strict=True):
            begin = time.process_time()
            losses.append(float(train_step(trainable, Pretrain(), batch, groups, max_norm=1.0).loss))
            taken.append(time.process_time() - begin)
        assert losses[0] == losses[1], f"{recipe}: {losses}"
    destroy_model_parallel()
    return [taken[1:] for taken in seconds]


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, metavar="N", help="timed steps of each way (default 6)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to see that it runs")
    parser.add_argument("--record", action="store_true", help="append the table to benchmarks/RESULTS.md")
    arguments = parser.parse_args()

    from megatron_ext.config import RuntimeConfig
    from megatron_ext.runtime.device import choose_device
    from megatron_ext.runtime.process_groups import end_process_groups, start_process_group

    runtime = RuntimeConfig(device="cpu", threads=1)
    start_process_group(runtime, choose_device(runtime), alone=True)
    rows = []
    for recipe, micro_batches in [(recipe, 4) for recipe in RECIPES] + [("tensorwise", 1), ("tensorwise", 16)]:
        again, once = seconds_of(recipe, micro_batches, arguments.steps, arguments.tiny)
        ratio = statistics.median(b / a for a, b in zip(again, once, strict=True))
        figures = [f"{statistics.median(taken):.3f}" for taken in (again, once)]
        rows.append([recipe, str(micro_batches), *figures, f"{1 - ratio:.0%}"])
        print(rows[-1], flush=True)
    end_process_groups()
    text = f"{hardware()}; 1 thread. {versions('torch', 'megatron-core')}. {arguments.steps} steps, taking turns.\n\n"
    text += markdown_table(COLUMNS, rows)
    print(text)
    if arguments.record:
        record("FP8 weights once a step, on CPU", text)


if __name__ == "__main__":
    main()
