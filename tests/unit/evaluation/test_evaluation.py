"""Losses of texts as transformers has them, whatever the windows; figures of samples; the command beside a run."""

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.errors import ConfigError, DataError, EnvironmentFault
from megatron_ext.evaluation.choice import choose, evaluated_results
from megatron_ext.evaluation.forgetting import changes
from megatron_ext.evaluation.harness import RESULTS_FILE, evaluate, keep, metrics_of, read_tasks, require_harness
from megatron_ext.evaluation.harness_options import HarnessOptions
from megatron_ext.evaluation.routing import Routing
from megatron_ext.evaluation.samples import repetition, sample_metrics, scripts_of
from megatron_ext.evaluation.text_loss import TextLoss, Windows, half_interval, read_texts, text_loss, windows_of
from megatron_ext.generation.prompts import Prompt
from megatron_ext.generation.sample import Continuation
from megatron_ext.generation.text_model import TextModel, text_model
from megatron_ext.monitoring.kept_results import evaluation_folder
from megatron_ext.monitoring.metrics_file import MetricsFile
from megatron_ext.monitoring.report.evaluations import evaluation_data, evaluation_table
from megatron_ext.monitoring.report.phases import RunFiles
from tests.support.commands import TOOLS, command
from tests.unit.data.chats import chat_tokenizer
from tests.unit.model_io.own_models import MODELS, write_checkpoint
from tools import evaluate as evaluate_tool

TEXTS = ["the model learns from text", "日本語の文章", "a", "every token counts once, from what is before it " * 3]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Megatron checkpoint that carries a chat tokenizer."""
    directory = tmp_path_factory.mktemp("evaluated")
    write_checkpoint(directory, replace(MODELS["Tanuki with a shared expert"], vocab_size=352))
    chat_tokenizer(directory / "iter_0000000" / "tokenizer")
    return directory


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Iterator[TextModel]:
    with text_model(checkpoint) as opened:
        yield opened


@torch.no_grad()
def test_the_loss_is_that_of_transformers(model: TextModel) -> None:
    found = text_loss(model, TEXTS, Windows(512, 256), batch_size=3)
    start = model.tokenizer.eos_token_id
    for number, text in enumerate(TEXTS):
        ids = torch.tensor([[start, *model.tokenizer(text, add_special_tokens=False)["input_ids"]]])
        expected = float(model.network(ids, labels=ids).loss) * (ids.shape[1] - 1)
        assert found.nats[number] == pytest.approx(expected, rel=1e-5)
        assert found.tokens[number] == ids.shape[1] - 1
        assert found.bytes[number] == len(text.encode())
    assert found.perplexity == pytest.approx(math.exp(sum(found.nats) / sum(found.tokens)))
    assert found.bits_per_byte == pytest.approx(sum(found.nats) / math.log(2) / sum(found.bytes))


@torch.no_grad()
def test_windows_with_a_stride_are_those_of_transformers_guide(model: TextModel) -> None:
    """https://huggingface.co/docs/transformers/perplexity: labels of what was predicted before are -100."""
    size, stride = 16, 5
    found = text_loss(model, TEXTS[3:], Windows(size, stride), batch_size=4)
    ids = torch.tensor(
        [[model.tokenizer.eos_token_id, *model.tokenizer(TEXTS[3], add_special_tokens=False)["input_ids"]]]
    )
    total, predicted = 0.0, 1
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + size, ids.shape[1])
        labels = ids[:, begin:end].clone()
        labels[:, : predicted - begin] = -100
        total += float(model.network(ids[:, begin:end], labels=labels).loss) * (end - predicted)
        predicted = end
        if end == ids.shape[1]:
            break
    assert found.nats == [pytest.approx(total, rel=1e-5)]


@given(tokens=st.integers(2, 200), size=st.integers(2, 40), stride=st.integers(1, 39))
def test_each_token_is_predicted_once_from_enough(tokens: int, size: int, stride: int) -> None:
    stride = min(stride, size - 1)
    predicted = []
    for begin, end, count in Windows(size, stride).of(tokens):
        assert end - begin <= size
        assert 0 < count < end - begin
        assert all(at - begin >= min(size - stride, at) for at in range(end - count, end))
        predicted += range(end - count, end)
    assert predicted == list(range(1, tokens))


def test_windows_beyond_what_a_model_was_made_for_are_said(model: TextModel, caplog: pytest.LogCaptureFixture) -> None:
    made_for = model.network.config.max_position_embeddings
    windows_of(model, made_for, None)
    assert not caplog.messages
    assert windows_of(model, made_for + 1, None).size == made_for + 1
    assert f"window = {made_for + 1}: {model.name} was made for {made_for} positions" in caplog.text


def test_windows_that_cannot_be_are_refused(model: TextModel) -> None:
    assert windows_of(model, 64, None) == Windows(64, 32)
    with pytest.raises(ConfigError, match="window = 8, stride = 8: the stride must"):
        windows_of(model, 8, 8)


def test_the_interval_of_equal_documents_is_that_of_a_mean() -> None:
    amounts = [1.0, 2.0, 4.0, 5.0]
    spread = math.sqrt(sum((a - 3) ** 2 for a in amounts) / 3)
    assert half_interval(amounts, [10] * 4) == pytest.approx(1.96 * spread / math.sqrt(4) / 10)
    assert math.isnan(half_interval([1.0], [1]))


def test_texts_are_read_one_by_one(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"text": " "}\n{"text": "y"}\n{"text": "z"}\n')
    assert list(read_texts(tmp_path / "a.jsonl", 2)) == ["x", "y"]
    assert list(read_texts(tmp_path / "a.jsonl", None)) == ["x", "y", "z"]
    (tmp_path / "b.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(DataError, match=r"b.jsonl: holds no text"):
        list(read_texts(tmp_path / "b.jsonl", None))
    (tmp_path / "c.jsonl").write_text('{"content": "w"}\n')
    assert list(read_texts(tmp_path / "c.jsonl", None, "content")) == ["w"]
    with pytest.raises(DataError, match=r"no text under 'text'; the line has: content; name the key .* \(--text-key\)"):
        read_texts(tmp_path / "c.jsonl", None)


def test_figures_of_samples() -> None:
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4, 1]) == pytest.approx(1 - 4 / 6)
    assert repetition([1, 2, 3]) == 0
    assert scripts_of("Aé1 ひカ漢 ﾊＡ सूर") == {"latin": 3, "japanese": 4, "devanagari": 2}
    made = [
        Continuation(Prompt("Where is it?"), "यहाँ", [5, 6, 7], ended=True),
        Continuation(Prompt("どこ？"), "東京 desu", [5] * 8, ended=False),
    ]
    assert sample_metrics(made) == {
        "length": 5.5,
        "end_of_turn_rate": 0.5,
        "end_of_turn_rate_interval": pytest.approx(1.96 * math.sqrt(0.25 / 2)),
        "repetition": pytest.approx((1 - 1 / 5) / 2),
        "script_of_prompt": 0.0,
        "script/devanagari": pytest.approx(2 / 8),
        "script/japanese": pytest.approx(2 / 8),
        "script/latin": pytest.approx(4 / 8),
    }


def test_what_was_forgotten_is_a_difference_beyond_its_interval() -> None:
    before = TextLoss([10.0, 25.0, 28.0, 44.0], [5] * 4, [10, 20, 30, 40])
    worse = [nats + 0.05 * size for nats, size in zip(before.nats, before.bytes, strict=True)]
    after = TextLoss([worse[0] + 0.01, *worse[1:]], [5] * 4, before.bytes)
    found = changes({"ja": before, "en": before}, {"ja": after, "en": before})
    assert found["ja"].difference == pytest.approx(0.0501 / math.log(2))
    assert found["ja"].interval < 0.01 * before.bits_interval  # what makes a document hard cancels
    assert [change.verdict for change in found.values()] == ["forgotten", "no difference seen"]
    assert changes({"ja": after}, {"ja": before})["ja"].verdict == "learned"
    with pytest.raises(DataError, match="the same documents"):
        changes({"ja": before}, {"ja": TextLoss([1.0], [1], [1])})


def test_experts_of_texts() -> None:
    even, odd = [0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]
    assert Routing({1: {"ja": even, "en": odd}}).apart(1) == pytest.approx(1)
    assert Routing({1: {"ja": even, "en": even}}).apart(1) == 0
    assert Routing({1: {"ja": [0.1, 0.6, 0.3]}}).favourites(1, "ja", 2) == [(1, 0.6), (2, 0.3)]


def test_a_checkpoint_is_chosen_by_the_mean_of_its_ranks(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.write({"iteration": 3, "validation_loss": 2.0})
    for step, loss, ends in ((1, 3.0, 0.5), (2, 1.0, 0.4), (3, 2.0, 0.5), (4, 1.0, None)):
        results = {"loss": loss} | ({} if ends is None else {"ends": ends})
        file.write({"event": "evaluation", "iteration": step, "text": "", "results": results})
    file.close()
    found = evaluated_results(tmp_path)
    assert found[3] == {"loss": 2.0, "ends": 0.5, "validation_loss": 2.0}
    choice = choose(found, {"loss": "min", "ends": "max"})
    # Ranks of loss: 3, 1, 2; of ends: 1.5, 3, 1.5.
    assert choice.ranks == {3: 1.75, 2: 2.0, 1: 2.25}
    assert (choice.best, choice.left_out) == (3, (4,))
    assert choose(found, {"loss": "min"}).best == 4  # of equal ones the later
    with pytest.raises(DataError, match="no checkpoint has all of score; there are: loss, ends, validation_loss"):
        choose(found, {"score": "max"})
    process = command(TOOLS / "evaluate.py", "choose", tmp_path, "--low", "loss", "--high", "ends")
    assert process.returncode == 0, process.stderr
    assert "chosen: step 3, by the lowest mean rank" in process.stdout


@torch.no_grad()
def chosen_experts(model: TextModel, text: str) -> dict[int, list[float]]:
    """The share of each expert in the layers that have some, counted in the export's own routers."""
    found: dict[int, list[float]] = {}
    routers = [
        (n, layer.mlp.gate) for n, layer in enumerate(model.network.model.layers, 1) if hasattr(layer.mlp, "gate")
    ]
    handles = []
    for number, router in routers:

        def count(module: Any, arguments: Any, output: Any, number: int = number) -> None:
            ids = output[0].flatten()
            found[number] = (ids.bincount(minlength=module.weight.shape[0]) / len(ids)).tolist()

        handles.append(router.register_forward_hook(count))
    model.network(torch.tensor([model.tokenizer(text)["input_ids"]]))
    for handle in handles:
        handle.remove()
    return found


def test_routing_and_forgetting_of_a_checkpoint_are_written(checkpoint: Path, model: TextModel, tmp_path: Path) -> None:
    texts = []
    for name, content in (("en", TEXTS[0]), ("ja", TEXTS[1])):
        (tmp_path / f"{name}.jsonl").write_text(f"{json.dumps({'text': content})}\n" * 2)
        texts.append(f"{name}={tmp_path / name}.jsonl")
    place, image = tmp_path / "routing.json", tmp_path / "routing.png"
    process = command(
        *(TOOLS / "evaluate.py", "routing", checkpoint, "--texts", *texts, "--output", place, "--plot", image)
    )
    assert process.returncode == 0, process.stderr
    said = json.loads(place.read_text())
    for layer, shares in said["shares"].items():
        assert all(sum(row) == pytest.approx(1) for row in shares.values())
        assert 0 < said["apart"][layer] < 1
    for name, text in (("en", TEXTS[0]), ("ja", TEXTS[1])):
        counted = chosen_experts(model, text)
        assert {int(layer): shares[name] for layer, shares in said["shares"].items()} == {
            layer: pytest.approx(shares) for layer, shares in counted.items()
        }
    assert image.read_bytes().startswith(b"\x89PNG")
    process = command(TOOLS / "evaluate.py", "forgetting", checkpoint, checkpoint, "--texts", *texts)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("no difference seen") == 2


def test_the_probe_of_a_checkpoint_prints_json_lines(checkpoint: Path, model: TextModel, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"messages": [{"role": "user", "content": "hi"}]}\n{"prompt": "a b"}\n')
    (tmp_path / "ja.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    process = command(
        *(TOOLS / "evaluate.py", "probe", checkpoint, "--prompts", tmp_path / "prompts.jsonl"),
        *("--max-new-tokens", "6", "--texts", f"ja={tmp_path / 'ja.jsonl'}", "--documents", "3", "--window", "32"),
        EVALUATION_DIRECTORY=str(tmp_path),
    )
    assert process.returncode == 0, process.stderr
    samples, texts = map(json.loads, process.stdout.splitlines())
    assert 1 <= samples["samples/length"] <= 6
    expected = text_loss(model, TEXTS[:3], Windows(32, 16))
    assert texts["text/ja/loss"] == pytest.approx(expected.loss, rel=1e-5)
    kept = json.loads((tmp_path / "samples.json").read_text())
    assert [row["prompt"] for row in kept] == ["hi", "a b"]


TASK = """
task: continued
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def test_a_local_task_of_the_harness_is_kept_beside_the_checkpoint(
    checkpoint: Path, model: TextModel, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval")
    data = tmp_path / "task.jsonl"
    rows = [
        {"text": "the model", "choices": ["learns", "text"], "answer": 0},
        {"text": "every token", "choices": ["a", "counts"], "answer": 1},
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "task.yaml").write_text(TASK.replace("DATA", str(data)))
    asked = HarnessOptions(model=str(checkpoint), tasks=[str(tmp_path)])
    found = evaluate(model, read_tasks(asked.tasks), asked)
    metrics = metrics_of(found)
    assert metrics["continued/acc"] == sum(_answer(model, row) == row["answer"] for row in rows) / len(rows)
    (tmp_path / "task.yaml").write_text(TASK.replace("DATA", str(tmp_path / "none.jsonl")))
    with pytest.raises(DataError, match="task.yaml: cannot be read as a task .*the data set of a task is read from"):
        read_tasks([str(tmp_path / "task.yaml")])


@torch.no_grad()
def _answer(model: TextModel, row: dict[str, Any]) -> int:
    """The likeliest choice, computed as the harness says that it does."""
    scores = []
    for choice in row["choices"]:
        ids = model.tokenizer(f"{row['text']} {choice}", return_tensors="pt")["input_ids"]
        before = model.tokenizer(row["text"], return_tensors="pt")["input_ids"].shape[1]
        logits = model.network(ids).logits.log_softmax(-1)[0, before - 1 : -1]
        scores.append(float(logits.gather(1, ids[0, before:, None]).sum()))
    return scores.index(max(scores))


def test_the_harness_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(EnvironmentFault, match=r"needs lm-evaluation-harness: pip install lm-eval \(or megatron-ext\["):
        require_harness()


def test_texts_are_looked_at_before_a_model_is_opened(tmp_path: Path) -> None:
    for word in ("loss", "probe"):
        with pytest.raises(DataError, match=r"missing\.jsonl: no such file or folder"):
            evaluate_tool.COMMANDS[word][0]([str(tmp_path / "model"), "--texts", f"ja={tmp_path / 'missing.jsonl'}"])


_KEEPS = """
import sys
from pathlib import Path
from megatron_ext.evaluation.harness import keep
for number in range(20):
    keep(Path(sys.argv[1]), "runs/a", {}, {f"{sys.argv[2]}/{number}": float(number)})
"""


def test_two_processes_that_keep_scores_at_the_same_time_lose_none(tmp_path: Path) -> None:
    place = tmp_path / "evaluation" / RESULTS_FILE
    writers = [subprocess.Popen([sys.executable, "-c", _KEEPS, place, name]) for name in ("a", "b")]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    kept = json.loads(place.read_text())
    assert kept["metrics"] == {f"{name}/{number}": float(number) for name in "ab" for number in range(20)}
    assert len(kept["runs"]) == 40
    assert [path.name for path in place.parent.iterdir()] == [RESULTS_FILE], "no lock is left"


def test_scores_by_hand_join_those_beside_the_run(tmp_path: Path) -> None:
    results = {"arc": {"name": "arc", "acc,none": 0.5, "acc_stderr,none": 0.1, "em,strict": 1, "f1_stderr,none": "N/A"}}
    metrics = metrics_of({"results": results})
    assert metrics == {"arc/acc": 0.5, "arc/acc_interval": pytest.approx(0.196), "arc/em/strict": 1.0}
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.write({"event": "evaluation", "iteration": 200, "text": "", "results": {"loss": 1.5}})
    file.close()
    place = evaluation_folder(tmp_path / "iter_0000100") / RESULTS_FILE
    keep(place, "runs/a", {"results": results}, metrics)
    keep(place, "runs/a", {"results": {}}, {"arc/acc": 0.75, "jcqa/acc": 0.25})
    (place.parent / "samples.json").write_text("[]")
    (place.parent / "damaged.json").write_text('{"metrics"')
    assert evaluated_results(tmp_path) == {100: metrics | {"arc/acc": 0.75, "jcqa/acc": 0.25}, 200: {"loss": 1.5}}
    assert len(json.loads(place.read_text())["runs"]) == 2
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(DataError, match="not written by tools/evaluate.py lm-eval"):
        keep(tmp_path / "other.json", "runs/a", {}, {})
    phase = RunFiles([str(tmp_path)]).phases()[0]
    assert evaluation_table(phase)[1][0][:2] == ["100", "0.75 ± 0.2"]
    assert evaluation_data(replace(phase, kept={100: {"x": 1.0, "x_interval": 0.5}, 200: {"x": 2.0}})) == {
        "step": [100, 200],
        "metrics": {"x": {"value": [1.0, 2.0], "half": [0.5, None]}},
    }
