#!/usr/bin/env python
"""Does upcycling pay? A dense model trained to a plateau, and then, with equal tokens: it goes on, or becomes a MoE.

  python benchmarks/upcycling.py --corpus ja=ja.jsonl en=en.jsonl hi=hi.jsonl --record
  python benchmarks/upcycling.py --tiny                    to see that it runs

Every way is trained with several seeds, on the same data with the same schedule: the ways of a seed see the same
samples in the same order, and all runs are validated on the same samples. The table has the validation loss and how far
experts have specialised; the plot has the validation loss over the tokens. Interrupted, it goes on.
"""

import argparse
import itertools
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import RESULTS, hardware, markdown_table, record, versions
from run_data import tool
from upcycling_figures import COLUMNS, Figures, figures_of, plot, rows

from megatron_ext.config import dump_yaml
from megatron_ext.data.python_corpus import write_python_corpus
from megatron_ext.model_io.open import open_checkpoint

VOCABULARY, LENGTH, BATCH = 4096, 128, 16
WIDTH = 384


@dataclass(frozen=True)
class Way:
    """What becomes of the dense model."""

    upcycle: tuple[str, ...] | None = None
    """Options of tools/upcycle.py; None: nothing."""
    model: tuple[tuple[str, Any], ...] = ()
    """Fields of the model where it is trained from scratch, or stays dense."""
    from_scratch: bool = False


DENSE = "dense, goes on"
COPY = ("--num-experts", "8", "--topk", "2")
WAYS = {
    DENSE: Way(),
    "MoE from scratch": Way(model=(("num_moe_experts", 8), ("moe_aux_loss_coeff", 1e-2)), from_scratch=True),
    "copy": Way((*COPY, "--no-gating-normalization")),
    "copy, normalized gate": Way(COPY),
    "drop 0.5": Way((*COPY, "--no-gating-normalization", "--method", "drop")),
    "shared and routed": Way(
        ("--num-experts", "16", "--topk", "4", "--method", "shared_routed", "--granularity", "2")
        + ("--shared-expert-size", str(WIDTH // 2), "--no-gating-normalization")
    ),
}


@dataclass(frozen=True)
class Plan:
    """Sizes of the benchmark."""

    folder: Path
    dense_steps: int
    steps: int
    seeds: int
    jobs: int
    """Runs at a time, each on one thread."""

    def run(self, name: str) -> Path:
        """Where a run is."""
        return self.folder / name.replace(", ", "-").replace(" ", "_")


def prepare(plan: Plan, corpora: dict[str, list[str]]) -> None:
    """Tokenizer and token files of every corpus."""
    tokenizer = plan.folder / "tokenizer"
    files = list(itertools.chain.from_iterable(corpora.values()))
    if not tokenizer.exists():
        print("tokenizing", flush=True)
        tool("tokenizer", "train", *files, "--output", tokenizer, "--vocab-size", VOCABULARY)
    for name, paths in corpora.items():
        if not (plan.folder / "data" / name).exists():
            output = plan.folder / "data" / name
            tool("preprocess", *paths, "--tokenizer", tokenizer, "--output", output, "--split", 0.95, 0.05, 0.0)


def tokens_of(plan: Plan, corpus: str, split: str = "train") -> int:
    """How many tokens of a corpus there are to learn from."""
    manifest = json.loads((plan.folder / "data" / corpus / "dataset.json").read_text(encoding="utf-8"))
    return int(manifest["splits"][split]["tokens"])


def blend(plan: Plan, corpora: list[str], split: str) -> list[dict[str, Any]]:
    """Every corpus as large as it is, so that none is repeated more often than another."""
    return [
        {"path": str(plan.folder / "data" / name / split), "weight": tokens_of(plan, name, split)} for name in corpora
    ]


def run_mapping(plan: Plan, corpora: list[str], directory: Path, steps: int, seed: int) -> dict[str, Any]:
    """A run on one process."""
    return {
        "model": {
            "num_layers": 4,
            "hidden_size": 128,
            "ffn_hidden_size": WIDTH,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": LENGTH,
        },
        "precision": {"kind": "fp32"},
        "train": {
            "train_iters": steps,
            "global_batch_size": BATCH,
            "micro_batch_size": BATCH,
            "seed": seed,
            "eval_interval": max(steps // 10, 1),
            "eval_iters": 24,
        },
        "optimizer": {"kind": "adam", "lr": 2e-3},
        "schedule": {"kind": "cosine", "warmup_iters": max(steps // 50, 1), "min_lr": 2e-4},
        "data": {
            "sequence_length": LENGTH,
            "tokenizer": str(plan.folder / "tokenizer"),
            "cache_dir": str(plan.folder / "cache" / directory.name),  # runs at a time do not share one
            "train": blend(plan, corpora, "train"),
            "validation": blend(plan, corpora, "validation"),
        },
        "checkpoint": {"directory": str(directory), "save_interval": steps, "keep_last": 1},
        "runtime": {"device": "cpu", "threads": 1},
    }


def train(plan: Plan, directory: Path, mapping: dict[str, Any]) -> None:
    """Train, unless it is done."""
    file = directory.with_name(directory.name + ".run.yaml")
    file.write_text(dump_yaml(mapping))
    tool("train", file)


def go(plan: Plan, corpora: list[str], name: str, seed: int) -> None:
    """One way with one seed."""
    way, directory = WAYS[name], plan.run(f"{name}.{seed}")
    mapping = run_mapping(plan, corpora, directory, plan.steps, seed)
    start = plan.run("dense")
    if way.upcycle is not None:
        start = plan.run(f"{name}.{seed}.start")
        if not start.exists():
            options = ("--router-std", 0.02, "--no-logits", "--force", "--seed", seed)
            tool("upcycle", plan.run("dense"), start, *way.upcycle, *options)
        model = open_checkpoint(start).run["model"]
        mapping["model"] = {**model, "moe_aux_loss_coeff": 1e-2}
    mapping["model"] |= dict(way.model)
    if not way.from_scratch:
        mapping["checkpoint"]["initialize_from"] = str(start)
    train(plan, directory, mapping)
    print(f"trained: {name}, seed {seed}", flush=True)


def read_corpora(plan: Plan, stated: list[str]) -> dict[str, list[str]]:
    """Files of each corpus by name; without any, the documentation and sources of Python."""
    if stated:
        return {name: paths.split(",") for name, _, paths in (one.partition("=") for one in stated)}
    path = plan.folder / "python.jsonl"
    if not path.exists():
        write_python_corpus(path)
    return {"python": [str(path)]}


def main() -> None:
    """Train everything, print, plot, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", nargs="*", default=[], metavar="NAME=FILE[,FILE...]", help="text of each kind")
    parser.add_argument("--dense-steps", type=int, default=1500, help="of the dense model (default 1500)")
    parser.add_argument("--steps", type=int, default=600, help="of each way after it (default 600)")
    parser.add_argument("--seeds", type=int, default=3, help="of each way (default 3)")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, each on one thread (default all cores)"
    )
    parser.add_argument("--folder", type=Path, default=Path("build/upcycling"), help="where runs are kept")
    parser.add_argument("--tiny", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--record", action="store_true", help="keep table and plot beside benchmarks/RESULTS.md")
    o = parser.parse_args()
    steps = (20, 10, 2) if o.tiny else (o.dense_steps, o.steps, o.seeds)
    plan = Plan(o.folder / "tiny" if o.tiny else o.folder, *steps, o.jobs)
    plan.folder.mkdir(parents=True, exist_ok=True)
    corpora = read_corpora(plan, o.corpus)
    prepare(plan, corpora)
    dense = plan.run("dense")
    train(plan, dense, run_mapping(plan, list(corpora), dense, plan.dense_steps, seed=100))
    names = list(corpora)
    with ThreadPoolExecutor(plan.jobs) as pool:  # threads, for each waits for processes
        list(pool.map(lambda run: go(plan, names, run[1], run[0]), itertools.product(range(plan.seeds), WAYS)))
    texts = {name: plan.folder / "data" / name / "validation" for name in names}

    def figures(run: str) -> Figures:
        return figures_of(plan.run(run), texts, sequences=BATCH, length=LENGTH)

    results = {name: [figures(f"{name}.{seed}") for seed in range(plan.seeds)] for name in WAYS}
    before = figures("dense").validation
    path = RESULTS.with_name("upcycling.png") if o.record else Path("build/upcycling.png")
    plot(results, before[-1][1], path)
    sizes = ", ".join(f"{name} {tokens_of(plan, name) / 1e6:.2f} M" for name in names)
    text = (
        f"{hardware()}; {versions('torch', 'megatron-core')}. Tokens to learn from: {sizes}. Dense model of "
        f"{plan.dense_steps} steps of {BATCH * LENGTH} tokens, validation loss {before[-1][1]:.4f} "
        f"({before[-2][1]:.4f} at nine tenths); then {plan.steps} steps of each way, mean and standard deviation over "
        f'{plan.seeds} seeds. "To dense" is the difference to the dense model that goes on with the same seed.\n\n'
        f"{markdown_table(COLUMNS, list(rows(results, DENSE)))}\n\n"
        f"![losses, router and loads of experts]({path.name})"
    )
    print(text)
    if o.record:
        record("Upcycling: does it learn?", text)


if __name__ == "__main__":
    main()
