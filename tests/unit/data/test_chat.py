"""Preparing conversations: files, masks, counts, interruptions, and the tokenizer that goes with them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import megatron_ext.data.prepare.preprocess as module
from megatron_ext.data.dataset import check_dataset_sums, dataset_fingerprint
from megatron_ext.data.inspect.options import RowsOptions
from megatron_ext.data.inspect.rows import show_rows
from megatron_ext.data.prepare.chat import ChatPreparation, ChatWorker, report
from megatron_ext.data.prepare.preprocess import preprocess
from megatron_ext.data.prepare.shard_work import Task, TextOptions
from megatron_ext.data.supervised import Supervised, check_supervised, mask_file, require_kind
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.data.tokenizer.load import load_tokenizer
from megatron_ext.errors import DataError
from tests.unit.data.chats import CHATML, chat_tokenizer, turns

SPLIT = (0.8, 0.2, 0.0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_tokenizer(tmp_path_factory.mktemp("chat") / "t")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def conversations(count: int = 40) -> list[dict[str, Any]]:
    rows = [{"messages": turns(f"question {n}", "answer " * (1 + n % 5), "more?", f"日本語 {n}")} for n in range(count)]
    rows[3]["weight"] = 0.5
    return rows


def as_text(tokenizer: Path, data: Supervised, number: int) -> list[str]:
    """The stretches of a sample that are trained on."""
    ids, counts, _ = data.sample(number)
    loaded, text, inside = load_tokenizer(tokenizer), list[list[int]](), False
    for token, counted in zip(ids.tolist(), counts.tolist(), strict=True):
        if counted and not inside:
            text.append([])
        if counted:
            text[-1].append(token)
        inside = counted
    return [loaded.decode(one) for one in text]


def test_files_masks_and_weights(tokenizer: Path, tmp_path: Path) -> None:
    rows = conversations()
    source = write_rows(tmp_path / "c.jsonl", rows)
    preprocess(
        [source], tokenizer, tmp_path / "d", how=ChatPreparation(), options=TextOptions(order="file", split=SPLIT)
    )
    said = json.loads((tmp_path / "d" / "dataset.json").read_text())
    seen: list[list[str]] = []
    for split in ("train", "validation"):
        summary = check_supervised(tmp_path / "d" / split, Tokenizer(tmp_path / "d" / "tokenizer"), "chat")
        check_dataset_sums(tmp_path / "d" / split)
        data = Supervised(tmp_path / "d" / split)
        samples = [data.sample(number) for number in range(len(data))]
        assert summary.supervised == sum(int(counts.sum()) for _, counts, _ in samples)
        assert summary.longest == max(len(ids) for ids, _, _ in samples)
        assert summary.tokens == sum(len(ids) for ids, _, _ in samples) == data.num_tokens
        assert not any(counts[0] for _, counts, _ in samples)
        seen += [as_text(tokenizer, data, number) for number in range(len(data))]
        texts = [as_text(tokenizer, data, number)[1] for number in range(len(data))]
        weights = {text: weight for text, (_, _, weight) in zip(texts, samples, strict=True)}
        assert all(weight == (0.5 if text == "日本語 3<|im_end|>" else 1.0) for text, weight in weights.items())
    expected = [[f"{message['content']}<|im_end|>" for message in row["messages"][1::2]] for row in rows]
    assert sorted(seen) == sorted(expected)
    assert said["read"] == {"rows": 40, "messages": 40}
    assert said["kind"] == "chat"
    lines = list(report(tmp_path / "d"))
    assert lines[0] == "40 rows read (40 messages), 0 left out"
    assert "of them trained on" in lines[-2]


def test_rows_are_counted_by_why_they_are_left_out(tokenizer: Path, tmp_path: Path) -> None:
    rows = [
        *conversations(5),
        {"messages": turns("u")},
        {"messages": turns("u", "<|im_end|>")},
        {"messages": turns("u", "long " * 500)},
        {"text": "plain"},
        {"odd": 1},
        {"messages": turns("u", "")},
    ]
    source = write_rows(tmp_path / "c.jsonl", rows)
    how = ChatPreparation(max_tokens=200)
    with pytest.raises(DataError, match=r"c.jsonl:7: message 1 \(assistant\): spells the control token"):
        preprocess([source], tokenizer, tmp_path / "d", how=how)
    options = TextOptions(bad_lines="skip", split=(1, 0, 0))
    preprocess([source], tokenizer, tmp_path / "d", how=how, options=options)
    said = json.loads((tmp_path / "d" / "dataset.json").read_text())
    left = {reason: count for reason, count in said["left_out"].items() if count}
    assert left == {
        "no answer of the assistant": 1,
        "spells a control token": 1,
        "too long": 1,
        "no known layout": 1,
    }
    nothing = "with an empty answer, which is trained on"
    assert said["read"] == {"rows": 11, "messages": 6, "text": 1, nothing: 1}
    assert said["splits"]["train"]["documents"] == 7
    kept = [json.loads(line) for line in (tmp_path / "d" / "dropped.jsonl").read_text().splitlines()]
    assert {one["reason"] for one in kept} == set(left)


def test_tables_hold_conversations_too(tokenizer: Path, tmp_path: Path) -> None:
    """Their columns have every key that any row has, with nothing in it where there is none."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows: list[dict[str, Any]] = [
        {"messages": turns("u", "a"), "weight": None, "conversations": None},
        {
            "messages": None,
            "weight": 2.0,
            "conversations": [{"from": "human", "value": "v"}, {"from": "gpt", "value": "b"}],
        },
    ]
    rows[0]["messages"][1]["train"] = True
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    preprocess([tmp_path / "c.parquet"], tokenizer, tmp_path / "d", how=ChatPreparation(), split=(1, 0, 0))
    data = Supervised(tmp_path / "d" / "train")
    found = {as_text(tokenizer, data, number)[0]: data.sample(number)[2] for number in range(2)}
    assert found == {"a<|im_end|>": 1.0, "b<|im_end|>": 2.0}


def files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("kind", ["chat", "preference"])
def test_workers_shards_and_interruptions_change_nothing(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    monkeypatch.setattr(module, "_SHARD_BYTES", 2000)
    rows = conversations()
    if kind == "preference":
        rows = [{"chosen": row["messages"], "rejected": [*row["messages"][:3], turns("", "no")[1]]} for row in rows]
    source, how = write_rows(tmp_path / "c.jsonl", rows), ChatPreparation(kind=kind)
    preprocess([source], tokenizer, tmp_path / "one", how=how, split=SPLIT)
    do, done = ChatWorker.do, list[int]()

    def dies(self: ChatWorker, task: Task) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        do(self, task)
        done.append(task.number)

    with monkeypatch.context() as patch:
        patch.setattr(ChatWorker, "do", dies)
        with pytest.raises(KeyboardInterrupt):
            preprocess([source], tokenizer, tmp_path / "two", how=how, split=SPLIT)
    assert not (tmp_path / "two").exists()
    monkeypatch.setattr(ChatWorker, "do", lambda self, task: (done.append(task.number), do(self, task))[1])
    preprocess([source], tokenizer, tmp_path / "two", how=how, split=SPLIT)
    assert sorted(done) == list(range(len(done)))
    assert len(done) > 3
    monkeypatch.setattr(ChatWorker, "do", do)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    if kind == "preference":  # processes cost seconds
        preprocess([source], tokenizer, tmp_path / "many", how=how, split=SPLIT, workers=2)
        assert files(tmp_path / "one") == files(tmp_path / "many")


def test_pairs_stand_together_with_the_common_prompt(tokenizer: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": turns(f"q{n}"), "chosen": turns("", f"good {n}")[1:], "rejected": turns("", "bad")[1:]}
        for n in range(30)
    ]
    source = write_rows(tmp_path / "p.jsonl", [*rows, {"chosen": turns("u", "a"), "rejected": turns("u", "a")}])
    preprocess([source], tokenizer, tmp_path / "d", how=ChatPreparation(kind="preference"), split=(1, 0, 0))
    summary = check_supervised(tmp_path / "d" / "train", Tokenizer(tmp_path / "d" / "tokenizer"), "preference")
    assert summary.samples == 60
    data = Supervised(tmp_path / "d" / "train")
    for pair in range(30):
        (chosen, counts, _), (rejected, others, _) = data.sample(2 * pair), data.sample(2 * pair + 1)
        prompt = int(np.argmax(counts))
        assert prompt == int(np.argmax(others))
        assert chosen[:prompt].tolist() == rejected[:prompt].tolist()
        assert as_text(tokenizer, data, 2 * pair)[0].startswith("good ")
        assert as_text(tokenizer, data, 2 * pair + 1) == ["bad<|im_end|>"]
    assert "1  chosen is rejected" in "\n".join(report(tmp_path / "d"))
    with pytest.raises(DataError, match="reads data of tools/preprocess.py --chat, and this is of .* --preference"):
        require_kind(tmp_path / "d" / "train", "chat", "task.kind = sft")


def test_the_tokenizer_beside_the_data_has_the_template_and_stops(tokenizer: Path, tmp_path: Path) -> None:
    source, template = write_rows(tmp_path / "c.jsonl", conversations()), tmp_path / "mine.jinja"
    template.write_text("{{ bos_token }}" + CHATML)
    marks = set()
    for name, how in {"own": ChatPreparation(), "given": ChatPreparation(template_file=str(template))}.items():
        preprocess([source], tokenizer, tmp_path / name, how=how)
        loaded = load_tokenizer(tmp_path / name / "tokenizer")
        assert loaded.chat_template == (template.read_text() if name == "given" else CHATML)
        assert "chat_template" not in json.loads((tmp_path / name / "tokenizer/tokenizer_config.json").read_text())
        stops = json.loads((tmp_path / name / "tokenizer/generation_config.json").read_text())["eos_token_id"]
        assert stops == sorted(loaded.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"]))
        assert Tokenizer(tmp_path / name / "tokenizer").fingerprint == Tokenizer(tokenizer).fingerprint
        marks.add(dataset_fingerprint(tmp_path / name / "train"))
    assert len(marks) == 2


def test_rows_are_shown_with_what_is_trained_on(tokenizer: Path, tmp_path: Path) -> None:
    row = {"messages": turns("1+1?", "2", system="s"), "weight": 0.5}
    pair = {"chosen": turns("u", "a"), "rejected": turns("u", "b")}
    for name, kind, one in (("d", "chat", row), ("p", "preference", pair)):
        source = write_rows(tmp_path / f"{name}.jsonl", [one])
        preprocess([source], tokenizer, tmp_path / name, how=ChatPreparation(kind=kind), split=(1, 0, 0))
    beside = str(tmp_path / "d" / "tokenizer")
    options = RowsOptions(prefix=str(tmp_path / "d" / "train.bin"), tokenizer=beside)
    head, title, text = show_rows(options, coloured=False)
    assert "1 samples for task.kind = sft" in head
    assert title.endswith(", 2 of them trained on, weight 0.5")
    before, behind = text.split("⟦")
    assert before.startswith("<|im_start|>system\ns<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>")
    assert behind == "2<|im_end|>⟧\n"
    assert "\033[30;42m2<|im_end|>\033[0m" in list(show_rows(options, coloured=True))[-1]
    pairs = list(show_rows(RowsOptions(prefix=str(tmp_path / "p" / "train"), tokenizer=beside), coloured=False))
    assert [line.strip().split(":")[0] for line in pairs[1::2]] == ["pair 0, chosen 0", "pair 0, rejected 1"]
    with pytest.raises(DataError, match="there is no sample 7; the last is 0"):
        list(show_rows(replace(options, first=7), coloured=False))


def test_damage_is_found(tokenizer: Path, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "c.jsonl", conversations())
    preprocess([source], tokenizer, tmp_path / "d", how=ChatPreparation(), split=(1, 0, 0))
    beside, described = Tokenizer(tmp_path / "d" / "tokenizer"), tmp_path / "d" / "dataset.json"
    whole = described.read_text()
    described.write_text(whole.replace('"ends"', '"endz"'))
    with pytest.raises(DataError, match="dataset.json: .*what tools/preprocess.py writes"):
        check_supervised(tmp_path / "d" / "train", beside, "chat")
    described.write_text(whole)
    mask_file(tmp_path / "d" / "train").write_bytes(b"")
    with pytest.raises(DataError, match=r"train.mask: is missing, or has not the \d+ bytes"):
        check_supervised(tmp_path / "d" / "train", beside, "chat")
    with pytest.raises(DataError, match="train: cannot be read"):
        Supervised(tmp_path / "d" / "train")
