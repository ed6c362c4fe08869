"""Preference optimisation: a run against transformers, interrupted as not. Its layouts: test_parity.py."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from megatron_ext.config import (
    LoraConfig,
    LoraTarget,
    ParallelConfig,
    PreferenceTask,
    RecomputeConfig,
)
from megatron_ext.data.prepare.chat import ChatPreparation
from megatron_ext.data.prepare.preprocess import preprocess
from megatron_ext.data.supervised import Supervised
from megatron_ext.monitoring.metrics_file import read_metrics
from megatron_ext.proving.parity import Cell, compare, run_layout
from megatron_ext.testing.pool import GlooPool, WorkerFailure
from megatron_ext.testing.tiny import tiny_model
from tests.distributed.chat_runs import batches_here, train_here, write_chat_run
from tests.distributed.layouts import TOLERANCE, GridCase, layout
from tests.unit.data.chats import chat_tokenizer, turns

LENGTH = 256

ADAPTERS = LoraConfig(targets=[LoraTarget(rank=4)])
LOSSES = [
    (layout("DP2", 2), False, None, PreferenceTask(kind="preference", loss="ipo", log_probs="mean")),
    (layout("TP2", 2, tp=2), False, None, PreferenceTask(kind="preference", loss="orpo")),
    (layout("CP4", 4, cp=4), False, ADAPTERS, PreferenceTask(kind="preference", loss="hinge")),
    (layout("PP2 DP2", 4, pp=2), True, ADAPTERS, PreferenceTask(kind="preference", label_smoothing=0.1)),
    (layout("PP2 VPP2", 2, pp=2, vpp=2), True, ADAPTERS, PreferenceTask(kind="preference")),
    (
        layout("TP2 SP EP2 ETP1", 2, tp=2, sp=True, ep=2, etp=1),
        True,
        ADAPTERS,
        PreferenceTask(kind="preference", loss="robust", label_smoothing=0.1),
    ),
    (
        layout("TP2 SP CP2 PP2 EP2 ETP2", 8, tp=2, sp=True, cp=2, pp=2, ep=2, etp=2),
        True,
        None,
        PreferenceTask(kind="preference", loss="simpo", beta=2.0, gamma=1.0),
    ),
]


@pytest.mark.product
@pytest.mark.parametrize(
    ("entry", "moe", "adapters", "task"),
    LOSSES,
    ids=lambda value: value.name.replace(" ", "-") if isinstance(value, GridCase) else "",
)
def test_every_loss_in_a_layout_is_that_of_one_process(
    entry: GridCase, moe: bool, adapters: LoraConfig | None, task: PreferenceTask, pool: GlooPool
) -> None:
    """Rows of one pair and of two, of which global batches cut the rest; the reference by both ways; recomputed."""
    alone = ParallelConfig(use_distributed_optimizer=False)
    cell = Cell(tiny_model(moe=moe), alone, task=task, adapters=adapters, steps=3)
    split = replace(cell, parallel=entry.parallel, recompute=RecomputeConfig(granularity="full"))
    reference = run_layout(pool, cell, 1)
    difference = compare(run_layout(pool, split, entry.processes), reference)
    print(f"{entry.name} {task.loss}: loss {difference.loss:.1e}, gradient norm {difference.norm:.1e}")
    assert min(reference.norms) > 1e-3
    assert difference.worst < TOLERANCE


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of transformers, pairs, and a run that prefers the chosen answers."""
    directory = tmp_path_factory.mktemp("preference")
    tokenizer = chat_tokenizer(directory / "t")
    with open(directory / "p.jsonl", "w") as file:
        for number in range(60):
            chosen, rejected = f"{number} " * (1 + number % 6), f"{number % 7} " * (1 + number % 4)
            row = {"prompt": turns(f"question {number}"), "chosen": turns("", chosen)[1:]}
            file.write(json.dumps({**row, "rejected": turns("", rejected)[1:]}) + "\n")
    preprocess([directory / "p.jsonl"], tokenizer, directory / "d", how=ChatPreparation(kind="preference"))
    write_chat_run(directory, "preference", LENGTH)
    return directory


def pairs_here(path: Path, overrides: list[str]) -> list[list[int]]:
    """The numbers of the pairs of every step."""
    steps = []
    for batch in batches_here(path, overrides):
        pairs = [micro.pairs for micro in batch]
        steps.append([int(number) for one in pairs if one is not None for number in one.numbers[one.is_pair_BP]])
    return steps


def steps_of(directory: Path) -> list[dict[str, Any]]:
    return [record for record in read_metrics(directory / "metrics.jsonl") if "loss" in record]


def judged(directory: Path, steps: list[list[int]], rate: float) -> list[dict[str, float]]:
    """The same steps by transformers and torch's autograd: DPO as its authors write it, each answer alone in a row."""
    data = Supervised(directory / "d" / "train")
    policy, frozen = (LlamaForCausalLM.from_pretrained(directory / "hf", dtype=torch.float32) for _ in range(2))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=rate, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)

    def log_prob(model: torch.nn.Module, sample: int) -> torch.Tensor:
        ids, counts, _ = data.sample(sample)
        tokens = torch.from_numpy(ids)[None]
        of_each = model(tokens).logits[0, :-1].log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0]
        return of_each[torch.from_numpy(counts[1:])].sum()

    found = []
    for pairs in steps:
        losses, rewards = [], []
        for pair in pairs:
            with torch.no_grad():
                before = [log_prob(frozen, 2 * pair + answer) for answer in (0, 1)]
            chosen, rejected = (0.1 * (log_prob(policy, 2 * pair + answer) - before[answer]) for answer in (0, 1))
            losses.append(-torch.nn.functional.logsigmoid(chosen - rejected))
            rewards.append((float(chosen.detach()), float(rejected.detach())))
        loss = torch.stack(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        margins = [a - b for a, b in rewards]
        found.append(
            {
                "loss": float(loss.detach()),
                "grad_norm": float(norm),
                "rewards/margins": sum(margins) / len(margins),
                "rewards/accuracies": sum(margin > 0 for margin in margins) / len(margins),
            }
        )
    return found


def test_a_run_is_that_of_transformers(work: Path, tmp_path: Path, pool: GlooPool) -> None:
    """The same weights, pairs and masks over several steps, packed here and each answer alone there."""
    overrides = [f"checkpoint.directory={tmp_path / 'run'}", f"logging.metrics_file={tmp_path / 'metrics.jsonl'}"]
    (steps,) = pool.run(1, pairs_here, work / "run.yaml", overrides)
    pool.run(2, train_here, work / "run.yaml", [*overrides, "parallel.context_parallel_size=2"])
    expected, ours = judged(work, steps, 1e-3), steps_of(tmp_path)
    assert ours[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    for key in expected[0]:
        differences = [abs(a[key] - b[key]) for a, b in zip(ours, expected, strict=True)]
        print(f"{key}: largest difference {max(differences):.1e} in {len(differences)} steps")
        assert [one[key] for one in ours] == pytest.approx([one[key] for one in expected], rel=1e-5, abs=2e-6)
    assert ours[-1]["loss"] < 0.69
    assert {"logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected"} <= ours[0].keys()


def test_interrupted_it_goes_on_bit_for_bit(work: Path, tmp_path: Path, pool: GlooPool) -> None:
    """Adapters beside a bf16 base, recomputed, saved while training goes on; another loss is refused on the way."""
    common = [
        "adapters.targets=[{rank: 4, dropout: 0.5}]",
        "precision.kind=bf16",
        "recompute.granularity=full",
        "checkpoint.async_save=true",
        "train.eval_interval=2",
        "train.train_iters=6",
    ]

    def places(name: str) -> list[str]:
        (tmp_path / name).mkdir(exist_ok=True)
        directory, metrics = tmp_path / name / "run", tmp_path / name / "metrics.jsonl"
        return [*common, f"checkpoint.directory={directory}", f"logging.metrics_file={metrics}"]

    pool.run(1, train_here, work / "run.yaml", places("whole"))
    pool.run(1, train_here, work / "run.yaml", [*places("parts"), "train.stop_at_iteration=3"])
    with pytest.raises(WorkerFailure, match="task.loss: 'sigmoid' in the checkpoint, 'hinge' in this run"):
        pool.run(1, train_here, work / "run.yaml", [*places("parts"), "task.loss=hinge"])
    pool.run(1, train_here, work / "run.yaml", places("parts"))
    whole, parts = (list(read_metrics(tmp_path / name / "metrics.jsonl")) for name in ("whole", "parts"))
    for key in ("loss", "grad_norm", "rewards/margins", "validation_loss", "validation_rewards/accuracies"):
        expected, found = ({r["iteration"]: r[key] for r in records if key in r} for records in (whole, parts))
        assert expected
        assert expected.items() <= found.items()  # its last step before the interruption is validated too
    first, *_, last = (record for record in whole if "loss" in record)
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-6), "policy and reference are one at the first step"
    assert (first["rewards/margins"], first["rewards/accuracies"]) == (0, 0)
    assert last["loss"] < first["loss"]
    assert not list((work / "d").glob("train.reference-bf16*")), "adapters are switched off, and nothing is kept"


def test_a_run_goes_on_with_its_reference_alone(work: Path, tmp_path: Path, pool: GlooPool) -> None:
    """Of all weights the fingerprint is known at the start; later they are others, and cannot say it again."""
    data = tmp_path / "d"
    data.mkdir()
    for file in (work / "d").iterdir():
        if ".reference-" not in file.name:
            (data / file.name).symlink_to(file)
    overrides = [
        f"data.train=[{{path: {data / 'train'}}}]",
        f"checkpoint.directory={tmp_path / 'run'}",
        "logging.metrics_file=null",
        "train.train_iters=2",
    ]
    pool.run(2, train_here, work / "run.yaml", [*overrides, "train.stop_at_iteration=1"])
    (kept,) = data.glob("*.reference-*")
    kept.rename(tmp_path / kept.name)
    with pytest.raises(WorkerFailure, match=r"what the reference of this run said of its pairs. Take it from a copy"):
        pool.run(1, train_here, work / "run.yaml", overrides)
    (tmp_path / kept.name).rename(kept)
    pool.run(1, train_here, work / "run.yaml", overrides)
    assert [file.name for file in data.glob("*reference*")] == [kept.name]
