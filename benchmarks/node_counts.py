#!/usr/bin/env python
"""One run on 24, then 30, then 36 ranks: the losses of the run that was never moved, and no rank that gathers anything.

python benchmarks/node_counts.py                            a few minutes on two quiet cores, 10 GB of memory
python benchmarks/node_counts.py --layers 70 --stages 6     the real depth and stages
python benchmarks/node_counts.py --layers 70 --stages 6 --ranks 48 30 36       EP 8 too; 20 GB

The layout of examples/recipes/llmjp4_291b.yaml, shrunk: 70 layers, 128 experts top-8, PP 6, VPP 2, embedding and loss
counted as layers, so that the first and last stage have fewer of them; one process stands for a node. EP 8 takes 48
ranks with PP 6, or a multiple; EP is the largest that the data-parallel size allows, and so another each time: with 3
stages DP 8, 10, 12 and EP 8, 2, 4; with 6 stages DP 4, 5, 6 and EP 4, 1, 2. The widths are tiny, and there is no
auxiliary loss of a micro-batch, which another data-parallel size cuts otherwise.
"""

import argparse
import math
import resource
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from report import hardware, markdown_table, record, versions

from megatron_ext.checkpoint.find import require_checkpoint
from megatron_ext.config import ModelConfig, ParallelConfig, RunConfig, load_config, to_mapping
from megatron_ext.data.stream.make_plan import SourceSize, make_plan
from megatron_ext.data.stream.stream import BatchShape
from megatron_ext.runtime.device import choose_device
from megatron_ext.runtime.process_groups import split_process_group
from megatron_ext.testing.pool import GlooPool
from megatron_ext.testing.tiny import VOCABULARY, RandomStream, random_batch
from megatron_ext.training.session import open_session

RANKS = (24, 30, 36)
STEPS = 2
"""With each number of ranks."""
LENGTH = 8
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Stretch:
    """Some steps of the run, with so many ranks."""

    ranks: int
    batch: int
    """Samples of a step: any of the numbers of ranks takes as many micro-batches as there are stages."""
    until: int
    last: int
    layers: int
    stages: int
    directory: Path

    @property
    def data_ranks(self) -> int:
        """The data-parallel size."""
        return self.ranks // self.stages

    def parallel(self) -> ParallelConfig:
        """The layout: the experts on as many of 8 data-parallel ranks as divide their number."""
        return ParallelConfig(
            pipeline_model_parallel_size=self.stages,
            virtual_pipeline_model_parallel_size=2,
            account_for_embedding_in_pipeline_split=True,
            account_for_loss_in_pipeline_split=True,
            expert_model_parallel_size=math.gcd(self.data_ranks, 8),
        )

    def run(self) -> RunConfig:
        """The configuration, in which only the micro-batches depend on the number of ranks."""
        model = ModelConfig(
            num_layers=self.layers,
            hidden_size=16,
            ffn_hidden_size=8,
            num_attention_heads=2,
            num_query_groups=1,
            kv_channels=8,
            qk_layernorm="head",
            vocab_size=VOCABULARY,
            max_position_embeddings=64,
            num_moe_experts=128,
            moe_router_topk=8,
            moe_ffn_hidden_size=8,
            moe_router_load_balancing_type="none",
            moe_aux_loss_coeff=0.0,
            moe_z_loss_coeff=1e-3,
        )
        raw = {
            "model": to_mapping(model),
            "parallel": to_mapping(self.parallel()),
            "precision": {"kind": "fp32"},
            "train": {
                "train_iters": self.last,
                "global_batch_size": self.batch,
                "micro_batch_size": self.batch // self.data_ranks // self.stages,
            },
            "optimizer": {"kind": "adam", "lr": 1e-3},
            "schedule": {"kind": "constant"},
            "data": {"sequence_length": LENGTH, "tokenizer": "none", "cache_dir": "none", "train": [{"path": "none"}]},
            "checkpoint": {"directory": str(self.directory)},
            "runtime": {"device": "cpu", "threads": 1},
        }
        return load_config(RunConfig, raw, source="benchmark")


class ShortStream(RandomStream):
    """Random batches of short sequences, the same ones however many ranks share them."""

    def next(self) -> list[Any]:
        """The next batch."""
        shape, step = self._shape, self._step
        self._step += 1
        return random_batch(
            step,
            samples=shape.global_batch,
            micro_batch=shape.micro_batch,
            dp_rank=shape.dp_rank,
            dp_size=shape.dp_size,
            length=LENGTH,
        )


def train(stretch: Stretch) -> tuple[list[float], int, int]:
    """Train on from the checkpoint, if there is one: losses, bytes of this rank's file, most bytes resident."""
    run = stretch.run()
    groups = split_process_group(run.parallel, run.runtime)
    device, layout = choose_device(run.runtime), run.resolve(dist.get_world_size())
    stream = ShortStream(
        BatchShape(stretch.batch, run.train.micro_batch_size, groups.dp.rank(), groups.dp.size()), device
    )
    plan = make_plan(run.data, run.train, {"none": SourceSize(10**9)})
    session = open_session(run, layout, groups, device, stream, plan)
    losses = []
    while session.state.iteration < stretch.until:
        losses.append(float(session.step(session.stream.next()).losses["loss"]))
    checkpoint = session.save()
    session.close()
    own = (checkpoint / f"__{dist.get_rank()}_0.distcp").stat().st_size
    return losses, own, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Train both runs and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22, help="2 more is a multiple of 2 STAGES (default 22)")
    parser.add_argument("--stages", type=int, choices=(3, 6), default=3, help="of the pipeline (default 3)")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS, help="one after the other (default 24 30 36)")
    parser.add_argument("--record", action="store_true", help="append the table to benchmarks/RESULTS.md")
    options = parser.parse_args()
    rows, moved, worst = [], list[float](), 0.0
    with tempfile.TemporaryDirectory() as folder, GlooPool(max(options.ranks)) as pool:
        last, batch = STEPS * len(options.ranks), math.lcm(*options.ranks)
        first = Stretch(options.ranks[0], batch, last, last, options.layers, options.stages, Path(folder) / "whole")
        whole = pool.run(first.ranks, train, first, timeout=3000)[0][0]
        print(f"never moved: losses {whole}", file=sys.stderr)
        for number, ranks in enumerate(options.ranks, start=1):
            part = replace(first, ranks=ranks, until=number * STEPS, directory=Path(folder) / "moved")
            answers = pool.run(ranks, train, part, timeout=3000)
            moved += answers[0][0]
            files = [size for _, size, _ in answers]
            there = sum(path.stat().st_size for path in require_checkpoint(part.directory).iterdir() if path.is_file())
            apart = max(abs(a - b) / abs(b) for a, b in zip(moved[-STEPS:], whole[len(moved) - STEPS :], strict=False))
            worst = max(worst, apart)
            peak = max(memory for _, _, memory in answers) / 2**20
            sizes = [max(files) / 1e6, sum(files) / len(files) / 1e6, there / 1e6]
            cells = [*(f"{size:.2f}" for size in sizes), f"{peak:.0f}"]
            degrees = [str(part.data_ranks), str(part.parallel().expert_model_parallel_size)]
            rows.append([f"{ranks}", *degrees, f"{part.until - STEPS + 1}-{part.until}", f"{apart:.1e}", *cells])
            print(f"{ranks} ranks: losses {moved[-STEPS:]}; {rows[-1]}", file=sys.stderr)
    columns = [
        "ranks",
        "DP",
        "EP",
        "steps",
        "loss, from the unmoved run's",
        "largest file, MB",
        "mean, MB",
        "all, MB",
        "peak MiB",
    ]
    machine = f"{hardware()}. {versions('torch', 'megatron-core')}. {options.layers} layers, {options.stages} stages."
    text = f"{machine}\n\n{markdown_table(columns, rows)}"
    print(text)
    if options.record:
        record(f"One run on {', '.join(map(str, options.ranks))} ranks", text)
    if not worst < TOLERANCE:
        raise SystemExit(f"the losses differ by {worst:.1e}")


if __name__ == "__main__":
    main()
