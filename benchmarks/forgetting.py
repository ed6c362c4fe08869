#!/usr/bin/env python
"""What does a model forget? Continual pretraining by LoRA, merged, then SFT by LoRA; beside all parameters.

  python benchmarks/forgetting.py --record            the folder of MEGATRON_EXT_SAMPLE_DATA; half an hour on 2 cores
  python benchmarks/forgetting.py --tiny              to see that it runs

A small model learns English and Hindi pages; then Japanese ones, some of them about commands of which the others say
nothing; then Japanese conversations, without those commands. Each model on the way is asked for its loss on held-out
pages of all three languages, which of four descriptions those commands belong to, in a page's form and as a user asks,
and whether its answers end. Targets A are all linear layers (and in pretraining both ends of the model), B those of
attention. Interrupted, it goes on.
"""

import argparse
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from forgetting_data import LENGTH, VOCABULARY, prepare, read_probes
from forgetting_figures import COLUMNS, Figures, figures_of, plot, read_figures, table
from report import RESULTS, hardware, markdown_table, record, versions

from megatron_ext.config import dump_yaml, load_run
from megatron_ext.merging.lora import merge_lora, silent
from megatron_ext.merging.lora_options import MergeLoraOptions
from megatron_ext.model_io.convert import convert
from megatron_ext.model_io.starting_weights import open_hugging_face
from megatron_ext.runtime.device import choose_device
from megatron_ext.runtime.process_groups import split_process_group
from megatron_ext.testing.pool import GlooPool
from megatron_ext.training import loop
from megatron_ext.training.watch import watching

BATCH, RANK = 4, 32
LINEAR, ATTENTION, ENDS = "layers.*", "self_attention.*", ["embedding.*", "output_layer"]
REPLAY = 0.2
_LONGEST = 6 * 3600.0
"""Seconds for a model, on a machine that others keep busy."""


@dataclass(frozen=True)
class Way:
    """How a stage is trained."""

    alpha: int | None = None
    """Of adapters of rank 32; None: all parameters are trained."""
    targets: tuple[str, ...] = (LINEAR,)
    replay: bool = False
    """A fifth of the tokens are pages of the stages before."""

    @property
    def lr(self) -> float:
        """Adapters of every alpha have the same, so that alpha is what differs."""
        return 5e-4 if self.alpha is None else 1e-3


PRETRAINING = {
    "LoRA alpha 128": Way(128, (LINEAR, *ENDS)),
    "LoRA alpha 32": Way(32, (LINEAR, *ENDS)),
    "LoRA alpha 128, replay": Way(128, (LINEAR, *ENDS), replay=True),
    "all parameters": Way(),
}
A32, A8, B32, B8 = Way(32), Way(8), Way(32, (ATTENTION,)), Way(8, (ATTENTION,))
TUNING = {
    "LoRA alpha 128": {"A 32": A32, "A 8": A8, "B 32": B32, "B 8": B8, "A 8, replay": Way(8, replay=True)},
    "LoRA alpha 32": {"A 32": A32, "A 8": A8, "B 32": B32, "B 8": B8},
    "LoRA alpha 128, replay": {"A 8, replay": Way(8, replay=True)},
    "all parameters": {"all": Way(), "all, replay": Way(replay=True)},
}


@dataclass(frozen=True)
class Plan:
    """Sizes of the study."""

    folder: Path
    early: int
    new: int
    chat: int
    """Steps of each stage."""

    def place(self, name: str) -> Path:
        """Where the model of this name is."""
        return self.folder / "models" / name.replace(", ", "-").replace(" ", "_")

    def beside(self, name: str, ending: str) -> Path:
        """Another file or folder of it; its seed is no ending to be replaced."""
        return self.place(f"{name}{ending}")


def mapping(plan: Plan, way: Way, stage: str, seed: int) -> dict[str, Any]:
    """A run of `stage`, which is `early`, `new` or `chat`, on one process."""
    steps = {"early": plan.early, "new": plan.new, "chat": plan.chat}[stage]
    before = {"new": "early", "chat": "replay"}.get(stage) if way.replay else None
    shares = {stage: 1.0} if before is None else {stage: 1 - REPLAY, before: REPLAY}
    lr = 3e-3 if stage == "early" else way.lr
    run: dict[str, Any] = {
        "model": {
            "num_layers": 2,
            "hidden_size": 96,
            "ffn_hidden_size": 256,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": LENGTH,
        },
        "precision": {"kind": "fp32"},
        "train": {"global_batch_size": BATCH, "micro_batch_size": BATCH, "seed": seed},
        "optimizer": {"kind": "adam", "lr": lr, "weight_decay": 0.0},
        "schedule": {"kind": "cosine", "warmup_iters": max(steps // 20, 1), "min_lr": lr / 10},
        "data": {
            "sequence_length": LENGTH,
            "tokenizer": str(plan.folder / "tokenizer"),
            "sources": {name: {"path": str(plan.folder / "data" / name / "train")} for name in shares},
            "stages": [{"name": stage, "mix": shares, "steps": steps}],
        },
        "logging": {"console": False, "log_interval": 20},
        "runtime": {"device": "cpu", "threads": 1},
    }
    if stage == "chat":
        run["task"] = {"kind": "sft"}
        run["data"]["tokenizer"] = str(plan.folder / "data" / "chat" / "tokenizer")
    if way.alpha is not None:
        run["adapters"] = {"targets": [{"match": list(way.targets), "rank": RANK, "alpha": way.alpha}]}
    return run


def make(plan: Plan, run: dict[str, Any], name: str, start: Path | None) -> None:
    """Train a model from `start` and write it as a Hugging Face directory; as one rank of a process group."""
    place, training = plan.place(name), plan.beside(name, ".run")
    run["checkpoint"] = {"directory": str(training), "save_interval": 200, "keep_last": 1}
    if start is not None:
        run["checkpoint"]["initialize_from"] = str(start)
    file = plan.beside(name, ".yaml")
    file.write_text(dump_yaml(run))
    config = load_run(file)
    groups, device = split_process_group(config.parallel, config.runtime), choose_device(config.runtime)
    with watching(config) as others:
        loop.open_and_train(config, config.resolve(dist.get_world_size()), groups, device, others, open_hugging_face)
    if config.adapters is None:
        convert(training, place, force=True)
    else:
        options = MergeLoraOptions(adapters=str(training), target=str(place), to="hf", dtype="fp32", force=True)
        merge_lora(options, silent)
    shutil.rmtree(training)


def ask(plan: Plan, name: str) -> None:
    """Write what a model still knows beside it."""
    probes, tokenizer = read_probes(plan.folder / "probes.json"), plan.folder / "data" / "chat" / "tokenizer"
    figures_of(plan.place(name), tokenizer, probes).write(plan.beside(name, ".json"))


def go(plan: Plan, pool: GlooPool, name: str, run: dict[str, Any], start: Path | None) -> Path:
    """A model and its figures, unless they are there."""
    place = plan.place(name)
    if not place.exists():
        pool.run(1, make, plan, run, name, start, timeout=_LONGEST)
    if not plan.beside(name, ".json").exists():
        pool.run(1, ask, plan, name, timeout=_LONGEST)
        print(f"done: {name}", flush=True)
    return place


def chain(plan: Plan, seed: int, pretraining: str) -> None:
    """One way of pretraining with one seed, and every way of tuning after it."""
    with GlooPool(1) as pool:
        name = f"{pretraining}.{seed}"
        start = go(plan, pool, name, mapping(plan, PRETRAINING[pretraining], "new", seed), plan.place("early"))
        for tuning, way in TUNING[pretraining].items():
            go(plan, pool, f"{pretraining}, {tuning}.{seed}", mapping(plan, way, "chat", seed), start)


def results_of(plan: Plan, seeds: int) -> dict[str, list[Figures]]:
    """Of every model in the order of the table."""

    def figures(name: str) -> Figures:
        return read_figures(plan.beside(name, ".json"))

    found = {"early languages alone": [figures("early")]}
    for pretraining, tunings in TUNING.items():
        found[f"{pretraining}: Japanese"] = [figures(f"{pretraining}.{seed}") for seed in range(seeds)]
        for tuning in tunings:
            name = f"{pretraining}: then SFT {tuning}"
            found[name] = [figures(f"{pretraining}, {tuning}.{seed}") for seed in range(seeds)]
    return found


def main() -> None:
    """Train everything, print, plot, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    samples = os.environ.get("MEGATRON_EXT_SAMPLE_DATA")
    parser.add_argument("--samples", type=Path, default=samples, help="folder with corpus/ and sft/ of tldr pages")
    parser.add_argument("--steps", type=int, nargs=3, default=[800, 200, 80], help="of each stage (default 800 200 80)")
    parser.add_argument("--seeds", type=int, default=3, help="of each way (default 3)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="at a time, each on one thread")
    parser.add_argument("--folder", type=Path, default=Path("build/forgetting"), help="where models are kept")
    parser.add_argument("--tiny", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--record", action="store_true", help="keep table and plot beside benchmarks/RESULTS.md")
    o = parser.parse_args()
    if o.samples is None:
        parser.error("--samples: give the folder, or set MEGATRON_EXT_SAMPLE_DATA")
    folder = (o.folder / "tiny" if o.tiny else o.folder).absolute()
    plan, seeds = (Plan(folder, 20, 4, 4), 1) if o.tiny else (Plan(folder, *o.steps), o.seeds)
    (folder / "models").mkdir(parents=True, exist_ok=True)
    prepare(o.samples, folder)
    with GlooPool(1) as pool:
        go(plan, pool, "early", mapping(plan, Way(), "early", 100), None)
    chains = [(seed, name) for seed in range(seeds) for name in PRETRAINING]
    with ThreadPoolExecutor(o.jobs) as threads:  # threads, for each waits for processes
        list(threads.map(lambda one: chain(plan, *one), chains))
    results = results_of(plan, seeds)
    path = RESULTS.with_name("forgetting.png") if o.record else folder / "forgetting.png"
    plot(results, path)
    text = (
        f"{hardware()}; {versions('torch', 'megatron-core')}. {plan.early}, {plan.new} and {plan.chat} steps of "
        f"{BATCH * LENGTH:,} tokens; mean and standard deviation over {seeds} seeds. Losses in nats a token, the rest "
        f"in percent; of facts 25 % are right by chance.\n\n{markdown_table(COLUMNS, table(results))}\n\n"
        f"![facts known against loss on earlier languages]({path.name})"
    )
    print(text)
    if o.record:
        record("What is forgotten", text)


if __name__ == "__main__":
    main()
