"""Supervised fine-tuning: one process as transformers, interrupted as not. Its layouts: test_parity.py."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import LlamaForCausalLM

from megatron_ext.data.prepare.chat import ChatPreparation
from megatron_ext.data.prepare.preprocess import preprocess
from megatron_ext.data.supervised import Supervised
from megatron_ext.data.tokenizer.load import load_tokenizer
from megatron_ext.mcore.embedding_noise import add_noise
from megatron_ext.model_io.convert import convert
from megatron_ext.monitoring.metrics_file import read_metrics
from megatron_ext.testing.pool import GlooPool, WorkerFailure
from tests.distributed.chat_runs import batches_here, train_here, write_chat_run
from tests.unit.data.chats import chat_tokenizer, turns

LENGTH = 64


def noise_here() -> torch.Tensor:
    groups = dist.group.WORLD
    assert groups is not None
    seeds, documents = torch.tensor([5, 6]), [[10, 6], [16]]
    return add_noise(torch.zeros(16, 2, 16), 5.0, seeds, documents, context=groups, tensor=None)


def test_neftune_by_the_vector(pool: GlooPool) -> None:
    """At 10 tokens, width 16 and alpha 5 the largest noise is 0.395285."""
    (noise,) = pool.run(1, noise_here)
    for row, begin, end in ((0, 0, 10), (0, 10, 16), (1, 0, 16)):
        part, most = noise[begin:end, row], 5 / ((end - begin) * 16) ** 0.5
        assert 0.9 * most < part.abs().max() <= most
        assert part.mean().abs() < most / 5
    assert pytest.approx(0.395285, abs=1e-6) == 5 / (10 * 16) ** 0.5


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of transformers, chat data, and a run that trains the one on the other."""
    directory = tmp_path_factory.mktemp("sft")
    tokenizer = chat_tokenizer(directory / "t")
    with open(directory / "c.jsonl", "w") as file:
        for number in range(120):
            row = {"messages": turns(f"question {number}", f"{number} " * (1 + number % 6)), "weight": 1 + number % 3}
            file.write(json.dumps(row) + "\n")
    preprocess([directory / "c.jsonl"], tokenizer, directory / "d", how=ChatPreparation(max_tokens=LENGTH))
    write_chat_run(directory, "sft", LENGTH)
    return directory


def packs_here(path: Path, overrides: list[str]) -> list[list[dict[str, Any]]]:
    """The packs of every step, as their samples: tokens, labels and weights."""
    steps = []
    for batch in batches_here(path, overrides):
        samples: list[dict[str, Any]] = []
        for micro in batch:
            assert micro.document_lengths is not None
            for row, lengths in enumerate(micro.document_lengths.tolist()):
                columns = [x[row].split(lengths) for x in (micro.tokens, micro.labels, micro.loss_mask)]
                samples += [
                    dict(zip(("tokens", "labels", "weights"), one, strict=True)) for one in zip(*columns, strict=True)
                ]
        steps.append([sample for sample in samples if sample["weights"].any()])
    return steps


def losses_of(directory: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(directory / "metrics.jsonl") if "loss" in record]


@pytest.mark.parametrize("weighting", ["token", "sample", "row"])
def test_losses_are_those_of_transformers(work: Path, tmp_path: Path, weighting: str, pool: GlooPool) -> None:
    """The same weights, rows and masks, each sample alone in a row: a pack leaks nothing and counts nothing twice."""
    overrides = [
        f"task.weighting={weighting}",
        f"checkpoint.directory={tmp_path / 'run'}",
        f"logging.metrics_file={tmp_path / 'metrics.jsonl'}",
    ]
    (steps,) = pool.run(1, packs_here, work / "run.yaml", overrides)
    pool.run(1, train_here, work / "run.yaml", overrides)
    model = LlamaForCausalLM.from_pretrained(work / "hf", dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    losses = []
    data = Supervised(work / "d" / "train")
    known = {tuple(ids.tolist()): (counts, weight) for ids, counts, weight in map(data.sample, range(len(data)))}
    for samples in steps:
        total, units = torch.zeros(()), 0.0
        for sample in samples:
            counts, weight = known[tuple(sample["tokens"].tolist())]  # by the files, not by the stream
            labels = torch.where(torch.from_numpy(counts), sample["tokens"], -100)[None]
            n = int(counts.sum())
            mean = model(sample["tokens"][None], labels=labels).loss
            each = {"token": n, "sample": 1.0, "row": n * weight}[weighting]
            total, units = total + mean * each, units + each
        loss = total / units
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses_of(tmp_path) == pytest.approx(losses, rel=2e-6)
    assert losses[-1] < losses[0]


def test_an_export_carries_the_template_and_stops_where_answers_end(work: Path, tmp_path: Path, pool: GlooPool) -> None:
    overrides = [f"checkpoint.directory={tmp_path / 'run'}", "train.train_iters=1", "logging.metrics_file=null"]
    pool.run(1, train_here, work / "run.yaml", overrides)
    convert(tmp_path / "run", tmp_path / "hf")
    exported = load_tokenizer(tmp_path / "hf")
    assert exported.chat_template == load_tokenizer(work / "t").chat_template
    stops = json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"]
    assert stops == sorted(exported.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"]))


def test_interrupted_it_goes_on_bit_for_bit(work: Path, tmp_path: Path, pool: GlooPool) -> None:
    """With noise on embeddings, and in the validation; another weighting is refused on the way."""
    common = ["train.eval_interval=2", "train.train_iters=8", "task.neftune_alpha=5"]

    def places(name: str) -> list[str]:
        (tmp_path / name).mkdir(exist_ok=True)
        directory, metrics = tmp_path / name / "run", tmp_path / name / "metrics.jsonl"
        return [*common, f"checkpoint.directory={directory}", f"logging.metrics_file={metrics}"]

    pool.run(1, train_here, work / "run.yaml", places("whole"))
    pool.run(1, train_here, work / "run.yaml", [*places("parts"), "train.stop_at_iteration=3"])
    with pytest.raises(WorkerFailure, match="task.weighting: 'token' in the checkpoint, 'row' in this run") as refused:
        pool.run(1, train_here, work / "run.yaml", [*places("parts"), "task.weighting=row"])
    assert "trained for another loss" in str(refused.value)
    pool.run(1, train_here, work / "run.yaml", places("parts"))
    whole, parts = (list(read_metrics(tmp_path / name / "metrics.jsonl")) for name in ("whole", "parts"))
    for key in ("loss", "grad_norm", "validation_loss"):
        expected, found = ({r["iteration"]: r[key] for r in records if key in r} for records in (whole, parts))
        assert expected
        assert expected.items() <= found.items()  # its last step before the interruption is validated too
