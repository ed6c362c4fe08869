#!/usr/bin/env python
"""Runs that are killed again and again, at random moments: do they end as the run that was not?

python benchmarks/kills.py --folder DIR                200 kills, half an hour on 2 quiet cores
python benchmarks/kills.py --folder DIR --record       and append the table to benchmarks/RESULTS.md
python benchmarks/kills.py --folder DIR --kills 10     does it run?

Ctrl-C (SIGINT) ends it with what it has by then.

One rank gets kill -9 at a moment drawn with --seed: after any number of seconds, or before any of the calls that
Python makes while it starts, asks a reference what it says of pairs, validates, reports, saves, completes or copies a
checkpoint. The others end by themselves, or are killed soon after, as it is drawn. The same command goes on until it is
killed again or has done all steps. Then nothing may tell the run from one that was never killed: reports, TensorBoard,
what W&B has, every tensor of the last checkpoint, what the reference said, to the last bit in fp32 and bf16, with
adapters, in fine-tuning and preference optimisation; to rounding where the number of ranks changes from start to start.
Ranks are forked from one process that has imported everything.
"""

import argparse
import json
import pickle
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import run_records
from killed_ranks import ANYWHERE, ONCE, Fork, Moment
from report import hardware, markdown_table, record, versions
from run_data import prepare, prepare_chats

from megatron_ext.checkpoint.find import require_checkpoint
from megatron_ext.checkpoint.metadata import METADATA_FILE
from megatron_ext.checkpoint.second_place import SecondPlace
from megatron_ext.checkpoint.torch_dist import TorchDistReader
from megatron_ext.config import dump_yaml
from megatron_ext.locks import LOCK_FILE

VOCABULARY, STEPS, PROCESSES = 512, 8, 2
LENGTHS = {"text": 64, "chat": 256}
GRACE = (0.0, 0.3, 30.0)
"""Seconds that the other ranks have for an end of their own."""
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}
"""Of a loss, where the number of ranks changes."""


@dataclass(frozen=True)
class Kind:
    """Runs that are alike: how they compute, and whether the number of ranks changes."""

    name: str
    precision: str
    share: float
    """Of all kills."""
    sizes: tuple[int, ...] = (PROCESSES,)
    has_adapters: bool = False
    task: Literal["pretrain", "sft", "preference"] = "pretrain"

    @property
    def keeps_reference(self) -> bool:
        """Whether what the reference says of the pairs is a file beside them."""
        return self.task == "preference" and not self.has_adapters

    @property
    def folder(self) -> str:
        """That of its runs."""
        return self.name.replace(", ", "_").replace(" ", "_")

    def configuration(self, folder: Path, directory: Path) -> dict[str, Any]:
        """The run in `directory`, with data and the base of adapters below `folder`."""
        raw: dict[str, Any] = {
            "model": {
                "num_layers": 2,
                "hidden_size": 32,
                "ffn_hidden_size": 64,
                "num_attention_heads": 4,
                "num_query_groups": 2,
                "vocab_size": VOCABULARY,
                "max_position_embeddings": LENGTHS["chat"],
                "num_moe_experts": 4,
                "moe_ffn_hidden_size": 32,
                "moe_gating_normalization": {},
                "moe_aux_loss_coeff": 0.01,
            },
            "precision": {"kind": self.precision},
            # One sample a micro-batch: then the auxiliary loss is that of any number of ranks.
            "train": {
                "train_iters": STEPS,
                "global_batch_size": 4,
                "micro_batch_size": 1,
                "eval_interval": 3,
                "eval_iters": 2,
            },
            "optimizer": {"kind": "adam", "lr": 1e-3},
            "schedule": {"kind": "cosine", "warmup_iters": 2},
            "data": self._data(folder, directory),
            "task": {"kind": self.task},
            "checkpoint": {
                "directory": str(directory / "run"),
                "save_interval": 2,
                "keep_last": 3,
                "copy_to": str(directory / "second"),
            },
            "logging": {"tensorboard_directory": str(directory / "tensorboard"), "wandb": {"mode": "offline"}},
            "runtime": {"device": "cpu", "threads": 1},
        }
        if self.has_adapters:
            raw["adapters"] = {"targets": [{"rank": 4}]}
        if self.has_adapters or self.task != "pretrain":
            raw["checkpoint"]["initialize_from"] = str(folder / KINDS[0].folder / "calm" / "run")
        return raw

    def _data(self, folder: Path, directory: Path) -> dict[str, Any]:
        """The section `data`. Runs that keep a reference beside their pairs have links to them of their own."""
        place = folder / {"pretrain": "data", "sft": "chat", "preference": "pairs"}[self.task]
        read = directory / "pairs" if self.keeps_reference else place
        return {
            "sequence_length": LENGTHS["text" if self.task == "pretrain" else "chat"],
            "tokenizer": str(folder / "tokenizer" if self.task == "pretrain" else place / "tokenizer"),
            "train": [{"path": str(read / "train")}],
            "validation": [{"path": str(read / "validation")}],
        }


KINDS = (
    Kind("fp32", "fp32", 0.2),
    Kind("bf16", "bf16", 0.2),
    Kind("adapters, bf16", "bf16", 0.1, has_adapters=True),
    Kind("SFT, bf16", "bf16", 0.1, task="sft"),
    Kind("DPO, LoRA, bf16", "bf16", 0.1, has_adapters=True, task="preference"),
    Kind("DPO, file, fp32", "fp32", 0.1, task="preference"),
    Kind("1, 2, 4 ranks, fp32", "fp32", 0.1, (1, 2, 4)),
    Kind("1, 2, 4 ranks, bf16", "bf16", 0.1, (1, 2, 4)),
)


@dataclass
class Life:
    """One run from its first step to its last, in a directory of its own."""

    kind: Kind
    directory: Path
    fork: Fork
    kills: Counter[str] = field(default_factory=Counter)
    starts: int = 0

    def start(self, size: int, moment: Moment | None = None, grace: float = 0) -> bool:
        """Start it, or go on with it; whether it was killed."""
        self.directory.mkdir(exist_ok=True)
        if self.kind.keeps_reference and not (pairs := self.directory / "pairs").is_dir():
            pairs.mkdir()
            for file in (self.directory.parent.parent / "pairs").iterdir():
                (pairs / file.name).symlink_to(file)
        yaml = self.directory / "run.yaml"
        yaml.write_text(dump_yaml(self.kind.configuration(self.directory.parent.parent, self.directory)))
        call = [str(yaml), f"parallel.expert_model_parallel_size={min(size, 2)}"]
        self.starts += 1
        with (self.directory / "log").open("a") as log:
            log.write(f"== start {self.starts} on {size} ranks: {moment}, {grace} s\n")
        killed = self.fork.train(size, call, self.directory / "log", moment, grace)
        if killed and moment is not None:
            self.kills[moment.place] += 1
        return killed

    def counts(self) -> dict[tuple[int, str], int]:
        """Calls of each rank at each place, after a start that was not killed."""
        files = ((rank, self.directory / f"calls.{rank}.json") for rank in range(PROCESSES))
        return {(rank, place): count for rank, file in files for place, count in json.loads(file.read_text()).items()}


def moments(counts: dict[tuple[int, str], int], seconds: float, draws: random.Random) -> Iterator[Moment]:
    """Moments without end, each place as often as the others."""
    names = sorted({place for _, place in counts})
    while True:
        for place in draws.sample([ANYWHERE, *names], len(names) + 1):
            rank = draws.choice([rank for rank in range(PROCESSES) if place == ANYWHERE or (rank, place) in counts])
            if place == ANYWHERE:
                yield Moment(rank, place, draws.uniform(0, seconds))
            else:
                # A start that goes on from the middle of the run has fewer of them left.
                most = counts[rank, place] // (1 if place in ONCE else 2)
                yield Moment(rank, place, draws.randint(1, max(most, 1)))


class Difference(NamedTuple):
    """What tells a run from the one that was never killed."""

    faults: list[str]
    apart: float = 0.0
    """How far its losses are from there, at most, relative to them."""
    lost: int = 0
    """Steps that W&B has not."""


def different(life: Life, calm: Life) -> Difference:
    """Compare reports, records and tensors of two runs that came to their end."""
    ours, theirs = life.directory / "run", calm.directory / "run"
    faults, apart = [], 0.0
    found, wanted = run_records.metrics(ours), run_records.metrics(theirs)
    order = [(one["iteration"], "loss" in one) for one in found]
    if order != [(one["iteration"], "loss" in one) for one in wanted]:
        return Difference([f"metrics.jsonl has {order}"])
    for one, other in zip(found, wanted, strict=True):
        key = "loss" if "loss" in one else "validation_loss"
        apart = max(apart, abs(one[key] - other[key]) / other[key])
    if [path.name for path in (*ours.iterdir(), *(life.directory / "second").iterdir()) if path.suffix == ".partial"]:
        faults.append("unfinished files are left")
    if (ours / LOCK_FILE).exists():
        faults.append("the lock is left")
    if (newest := SecondPlace(str(life.directory / "second")).complete()[-1]) != f"iter_{STEPS:07d}":
        faults.append(f"the newest of the second place is {newest}")
    there, expected = run_records.wandb(ours), run_records.wandb(theirs)
    lost = len({step for _, step in expected} - {step for _, step in there})
    events, calm_events = (run_records.tensorboard(one.directory / "tensorboard") for one in (life, calm))
    if set(there) != set(expected) or set(events) != set(calm_events):
        faults.append("W&B or TensorBoard have other steps")
    if len(life.kind.sizes) > 1:
        if apart > TOLERANCE[life.kind.precision]:
            faults.append(f"losses are {apart:.1e} apart")
        return Difference(faults, apart, lost)
    faults += [
        f"step {one['iteration']} was reported otherwise"
        for one, other in zip(found, wanted, strict=True)
        if one != other
    ]
    if there != expected:
        faults.append("W&B has other figures")
    if events != calm_events:
        faults.append("TensorBoard has other figures")
    if life.kind.keeps_reference:
        said, wanted_to = (
            {f.name: f.read_bytes() for f in one.directory.glob("pairs/*.reference-*")} for one in (life, calm)
        )
        faults += [] if said == wanted_to else ["the reference says something else of the pairs"]
    faults += other_tensors(require_checkpoint(ours), require_checkpoint(theirs))
    return Difference(faults, apart, lost)


def other_tensors(ours: Path, theirs: Path) -> list[str]:
    """What the tensors of two checkpoints have otherwise, weights and optimizer alike."""
    keys, others = (
        sorted(pickle.loads((place / METADATA_FILE).read_bytes()).state_dict_metadata) for place in (ours, theirs)
    )
    if keys != others:
        return ["the checkpoint has other tensors"]
    one, other = TorchDistReader(ours), TorchDistReader(theirs)
    return [f"{key} is another" for key in keys if not (one.read(key) == other.read(key)).all()]


@dataclass
class Sum:
    """What became of the runs of one kind."""

    kind: Kind
    kills: Counter[str] = field(default_factory=Counter)
    lives: int = 0
    starts: int = 0
    apart: float = 0.0
    lost: int = 0
    faults: list[str] = field(default_factory=list)

    def add(self, life: Life, calm: Life) -> None:
        """Take a run that has come to its end."""
        found = different(life, calm)
        self.lost, self.apart = self.lost + found.lost, max(self.apart, found.apart)
        self._count(life, found.faults)

    def fail(self, life: Life, why: str) -> None:
        """Take a run that cannot be compared."""
        self._count(life, [why])

    def _count(self, life: Life, faults: list[str]) -> None:
        self.kills += life.kills
        self.lives, self.starts = self.lives + 1, self.starts + life.starts
        self.faults += [f"{life.directory}: {fault}" for fault in faults]


class Series:
    """Runs of one kind after each other, beside the one that was never killed, which is made first."""

    def __init__(self, kind: Kind, folder: Path, fork: Fork, kills: int, seed: int) -> None:
        self._place, self._fork, self.kills = folder / kind.folder, fork, kills
        self._draws, self.sum = random.Random(f"{seed} {kind.name}"), Sum(kind)
        self._place.mkdir()
        self._calm, begun = Life(kind, self._place / "calm", fork), time.monotonic()
        self._calm.start(PROCESSES)
        self._coming = moments(self._calm.counts(), time.monotonic() - begun, self._draws)

    @property
    def done(self) -> float:
        """The share of its kills that was made."""
        return self.sum.kills.total() / self.kills if self.kills else 1.0

    def live(self) -> None:
        """One more run, killed as often as there are kills left to make."""
        total, begun = self.sum, time.monotonic()
        life, left = Life(total.kind, self._place / f"killed_{total.lives + 1}", self._fork), self.kills
        left -= total.kills.total()
        try:
            while life.start(
                self._draws.choice(total.kind.sizes),
                next(self._coming) if life.kills.total() < left else None,
                self._draws.choice(GRACE),
            ):
                pass
            total.add(life, self._calm)
        except SystemExit as error:  # it ended otherwise than it may, or its records cannot be read
            total.fail(life, str(error))
        took, said = time.monotonic() - begun, f"{life.kills.total()} kills in {life.starts} starts"
        made = f"{total.kills.total()} of {self.kills}"
        print(f"{total.kind.name}: {said}, {took:.0f} s; {made}, {len(total.faults)} faults", flush=True)


def table(sums: list[Sum]) -> str:
    """Both tables."""
    names = sorted({name for one in sums for name in one.kills}, key=lambda name: (name == ANYWHERE, name))
    rows = [[name, *(str(one.kills[name]) for one in sums)] for name in names]
    rows += [
        ["kills", *(str(one.kills.total()) for one in sums)],
        ["runs", *(str(one.lives) for one in sums)],
        ["starts", *(str(one.starts) for one in sums)],
        ["losses apart, at most", *(f"{one.apart:.1e}" if one.apart else "0" for one in sums)],
        ["steps that W&B lacks", *(str(one.lost) for one in sums)],
        ["faults", *(str(len(one.faults)) for one in sums)],
    ]
    return markdown_table(["killed", *(one.kind.name for one in sums)], rows)


def main() -> None:
    """Kill, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, metavar="N", help="in all (default 200)")
    parser.add_argument("--kinds", nargs="+", choices=[k.name for k in KINDS], metavar="KIND", help="not all of them")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments (default 0)")
    parser.add_argument("--folder", type=Path, required=True, metavar="DIR", help="a new folder for all runs")
    parser.add_argument("--record", action="store_true", help="append the table to benchmarks/RESULTS.md")
    options = parser.parse_args()
    folder, begin = options.folder.absolute(), time.monotonic()
    folder.mkdir(parents=True)
    prepare(folder, VOCABULARY)
    prepare_chats(folder, LENGTHS["chat"])
    fork, series = Fork(), list[Series]()
    wanted = [kind for kind in KINDS if options.kinds is None or kind.name in options.kinds]
    kills = options.kills / sum(kind.share for kind in wanted)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell takes from what it starts with &
    try:
        for kind in KINDS:
            if kind in wanted or kind is KINDS[0]:  # whose model the others begin with
                wants = round(kills * kind.share) if kind in wanted else 0
                series.append(Series(kind, folder, fork, wants, options.seed))
        while (next_one := min(series, key=lambda one: one.done)).done < 1:
            next_one.live()
    except KeyboardInterrupt:
        print("interrupted: this is what there is")
    sums = [one.sum for one in series]
    faults = [fault for one in sums for fault in one.faults]
    kills, took = sum(one.kills.total() for one in sums), time.monotonic() - begin
    text = f"""{hardware()}; {versions("torch", "megatron-core")}

{table(sums)}

{kills} kills in {took:.0f} s; {len(faults)} faults. Every run had {STEPS} steps, a checkpoint after every second one
and a validation after every third."""
    print(text)
    for fault in faults[:20]:
        print(fault)
    if options.record:
        record("Runs that are killed", text)
    raise SystemExit(1 if faults else 0)


if __name__ == "__main__":
    main()
