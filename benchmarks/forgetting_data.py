"""Data of the study of forgetting: two early languages, a new one with facts that stand nowhere else, conversations."""

import json
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from run_data import ROOT, tool

from megatron_ext.data.prepare.chat import ChatPreparation
from megatron_ext.data.prepare.preparation import PLAIN_TEXT
from megatron_ext.data.prepare.preprocess import preprocess

EARLY, NEW = ("en", "hi"), "ja"
VOCABULARY, LENGTH = 2048, 256
_FACT_PAGES, _FACTS, _CHOICES = 50, 80, 4
_HELD_OUT = 12
"""One page in so many, and one conversation, is for validation."""
_ITEM = re.compile(r"^- (?P<what>.+?)[:：]?\n+`(?P<command>[^`\n]+)`", re.MULTILINE)


@dataclass(frozen=True)
class Fact:
    """A description, the command that does it, and descriptions of other commands."""

    what: str
    command: str
    others: tuple[str, ...]


@dataclass(frozen=True)
class Probes:
    """What every model is asked."""

    texts: dict[str, list[str]]
    """Held-out pages of each language."""
    facts: list[Fact]
    chats: list[list[dict[str, str]]]
    """Held-out conversations."""

    def write(self, path: Path) -> None:
        """Keep them in a JSON file."""
        path.write_text(json.dumps(asdict(self), ensure_ascii=False), encoding="utf-8")


def read_probes(path: Path) -> Probes:
    """What `write` has written."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    facts = [Fact(one["what"], one["command"], tuple(one["others"])) for one in content["facts"]]
    return Probes(content["texts"], facts, content["chats"])


def prepare(samples: Path, folder: Path) -> Probes:
    """Write tokenizer, the data sets `early`, `new`, `chat` and `replay`, and the probes, into `folder`."""
    if (folder / "probes.json").exists():
        return read_probes(folder / "probes.json")
    pages = {lang: _pages(samples / f"corpus/{lang}_tldr.jsonl") for lang in (*EARLY, NEW)}
    draws = random.Random(0)
    of_facts = draws.sample(pages[NEW], _FACT_PAGES)
    titles = {_title(page) for page in of_facts}
    early = {lang: [page for page in pages[lang] if _title(page) not in titles] for lang in EARLY}
    plain = [page for page in pages[NEW] if page not in of_facts]
    texts = {lang: found[::_HELD_OUT] for lang, found in {**early, NEW: plain}.items()}
    first = [page for lang in EARLY for page in early[lang] if page not in texts[lang]]
    second = [page for page in pages[NEW] if page not in texts[NEW]]
    of_pages = {item["command"] for page in of_facts for item in _ITEM.finditer(page)}
    talks = [row["messages"] for row in _rows(samples / f"sft/{NEW}.jsonl")]
    counts = Counter(talk[-2]["content"] for talk in talks)
    known = {command.replace(" ", "") for command in of_pages}
    talks = [t for t in talks if counts[t[-2]["content"]] == 1 and t[-1]["content"].replace(" ", "") not in known]
    kept = [talk for number, talk in enumerate(talks) if number % _HELD_OUT]
    for name, rows in {
        "early": [{"text": page} for page in first],
        "new": [{"text": page} for page in second],
        "replay": [{"text": page} for page in draws.sample(first, len(second)) + second],
        "chat": [{"messages": talk} for talk in kept],
    }.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    _tokenize(folder)
    probes = Probes(texts, _questions(of_facts, draws), talks[::_HELD_OUT])
    probes.write(folder / "probes.json")
    return probes


def _pages(path: Path) -> list[str]:
    """Those that describe something of their own: most say of an alias that there is another page."""
    pages = [row["text"] for row in _rows(path)]
    counts = Counter(item["what"] for page in pages for item in _ITEM.finditer(page))
    return [page for page in pages if any(counts[item["what"]] == 1 for item in _ITEM.finditer(page))]


def _tokenize(folder: Path) -> None:
    files = [folder / f"{name}.jsonl" for name in ("early", "new")]
    tool("tokenizer", "train", *files, "--output", folder / "tokenizer", "--vocab-size", VOCABULARY, "--force")
    chat = ChatPreparation(template_file=str(ROOT / "examples/chat/template.jinja"), max_tokens=LENGTH)
    for name, how in {"early": PLAIN_TEXT, "new": PLAIN_TEXT, "chat": chat, "replay": chat}.items():
        output = folder / "data" / name
        preprocess([folder / f"{name}.jsonl"], folder / "tokenizer", output, how=how, split=(1, 0, 0), force=True)


def _questions(pages: Sequence[str], draws: random.Random) -> list[Fact]:
    """Of these pages, each beside descriptions of other commands."""
    items = {item["what"]: item["command"] for page in pages for item in _ITEM.finditer(page)}
    asked = draws.sample(list(items), min(_FACTS, len(items)))
    facts = []
    for what in asked:
        others = draws.sample([other for other in items if items[other] != items[what]], _CHOICES - 1)
        facts.append(Fact(what, items[what], tuple(others)))
    return facts


def _title(page: str) -> str:
    return page.split("\n", 1)[0].removeprefix("#").strip()


def _rows(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
