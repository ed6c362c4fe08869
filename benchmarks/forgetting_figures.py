"""What a model of the study of forgetting still knows: losses, facts, ended answers; the table and the plot of all."""

#   R rows, S tokens of the longest

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from forgetting_data import EARLY, LENGTH, NEW, Fact, Probes
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from megatron_ext.data.tokenizer.load import load_tokenizer

_PROMPTS, _MOST_NEW = 32, 40
_PAGES = 16
_ROWS = 32


@dataclass(frozen=True)
class Figures:
    """Of one model."""

    losses: dict[str, float]
    """Nats a token: of held-out pages of each language, of answers in held-out conversations (`chat`), of the answers
    to questions of fact in a page's form (`facts`)."""
    facts: float
    """Share of commands that are likeliest after their own description, of four, in a page's form."""
    asked: float
    """The same where the description is a user's turn."""
    ended: float
    """Share of answers to held-out prompts, the likeliest token each time, that end by themselves."""

    def write(self, path: Path) -> None:
        """Keep them in a JSON file."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")


def read_figures(path: Path) -> Figures:
    """What `write` has written."""
    return Figures(**json.loads(path.read_text(encoding="utf-8")))


class _Asked:
    """A model of transformers, and how it is asked."""

    def __init__(self, directory: Path, tokenizer: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        self.tokenizer: Any = load_tokenizer(tokenizer)
        self.end = int(self.tokenizer.eos_token_id)

    def ids(self, text: str) -> list[int]:
        """Of text without any token around it."""
        found: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return found

    def prompt(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """A conversation, and the beginning of its answer."""
        text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return self.ids(text)

    def losses(self, rows: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, int]]:
        """Of the second part of each row after the first: the sum in nats, and how many tokens it has."""
        found = list[tuple[float, int]]()
        for begin in range(0, len(rows), _ROWS):
            part = [(first, second[: LENGTH - len(first)]) for first, second in rows[begin : begin + _ROWS]]
            longest = max(len(first) + len(second) for first, second in part)
            tokens_RS = torch.full((len(part), longest), self.end)
            counts_RS = torch.zeros(len(part), longest, dtype=torch.bool)
            for row, (first, second) in enumerate(part):
                both = torch.tensor([*first, *second])
                tokens_RS[row, : len(both)] = both
                counts_RS[row, max(len(first), 1) : len(both)] = True
            logits: Tensor = self.model(tokens_RS).logits[:, :-1]
            each_RS = cross_entropy(logits.transpose(1, 2), tokens_RS[:, 1:], reduction="none") * counts_RS[:, 1:]
            found += zip(each_RS.sum(1).tolist(), counts_RS[:, 1:].sum(1).tolist(), strict=True)
        return found

    def mean(self, rows: Sequence[tuple[list[int], list[int]]]) -> float:
        """Nats a token over all rows."""
        found = self.losses(rows)
        return sum(loss for loss, _ in found) / sum(count for _, count in found)


@torch.no_grad()
def figures_of(directory: Path, tokenizer: Path, probes: Probes) -> Figures:
    """Ask the Hugging Face model in `directory` everything."""
    asked = _Asked(directory, tokenizer)
    losses = {
        language: asked.mean([([], asked.ids(page)[:LENGTH]) for page in pages[:_PAGES]])
        for language, pages in probes.texts.items()
    }
    talks = [(asked.prompt(talk[:-1]), [*asked.ids(talk[-1]["content"]), asked.end]) for talk in probes.chats]
    losses["chat"] = asked.mean(talks)
    system = [message for message in probes.chats[0] if message["role"] == "system"]

    def page(what: str) -> list[int]:
        return asked.ids(f"- {what}:\n\n`")

    def turn(what: str) -> list[int]:
        return asked.prompt([*system, {"role": "user", "content": what}])

    right, loss = _choices(asked, probes.facts, page, "`")
    losses["facts"] = loss
    return Figures(losses, right, _choices(asked, probes.facts, turn, None)[0], _ended(asked, talks[:_PROMPTS]))


def _choices(asked: _Asked, facts: Sequence[Fact], context: Any, ending: str | None) -> tuple[float, float]:
    """The share of commands that are likeliest after their own description, and their nats a token after it."""
    rows = []
    for fact in facts:
        command = asked.ids(fact.command + (ending or "")) + ([asked.end] if ending is None else [])
        rows += [(context(what), command) for what in (fact.what, *fact.others)]
    found = asked.losses(rows)
    size = len(facts[0].others) + 1
    groups = [found[n : n + size] for n in range(0, len(found), size)]
    own = [group[0] for group in groups]
    right = [group[0][0] < min(loss for loss, _ in group[1:]) for group in groups]
    return statistics.fmean(right), sum(loss for loss, _ in own) / sum(count for _, count in own)


def _ended(asked: _Asked, talks: Sequence[tuple[list[int], list[int]]]) -> float:
    """Prompts stand at the right end of their rows, behind padding that nothing attends to."""
    longest = max(len(prompt) for prompt, _ in talks)
    tokens_RS = torch.tensor([[asked.end] * (longest - len(prompt)) + prompt for prompt, _ in talks])
    there_RS = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt, _ in talks])
    made = asked.model.generate(
        tokens_RS,
        attention_mask=there_RS,
        max_new_tokens=_MOST_NEW,
        do_sample=False,
        eos_token_id=asked.end,
        pad_token_id=asked.end,
    )
    return float((made[:, longest:] == asked.end).any(dim=1).float().mean())


COLUMNS = ("model", *(f"loss {name}" for name in (*EARLY, NEW)), "loss answers", "facts, page", "facts, asked", "ended")


def table(results: Mapping[str, Sequence[Figures]]) -> list[list[str]]:
    """A row for each model: mean and standard deviation over seeds."""
    return [
        [
            name,
            *(_spread([one.losses[key] for one in figures], 2) for key in (*EARLY, NEW, "chat")),
            *(_spread([100 * getattr(one, key) for one in figures], 0) for key in ("facts", "asked", "ended")),
        ]
        for name, figures in results.items()
    ]


def _spread(values: Sequence[float], digits: int) -> str:
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def plot(results: Mapping[str, Sequence[Figures]], path: Path) -> None:
    """Loss on the earlier languages against facts that are known when asked, a point for each seed, and its means."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(13, 6), sharex=True, constrained_layout=True)
    colors = pyplot.get_cmap("tab20").colors  # type: ignore[attr-defined]
    for ax, attribute, label in ((axes[0], "facts", "facts in a page's form"), (axes[1], "asked", "facts when asked")):
        for number, (name, seeds) in enumerate(results.items()):
            early = [statistics.fmean(one.losses[key] for key in EARLY) for one in seeds]
            known = [100 * getattr(one, attribute) for one in seeds]
            color = colors[number % len(colors)]
            ax.scatter(early, known, s=14, alpha=0.4, color=color)
            marker = "os^D*vP"[number // 3 % 7]
            ax.scatter(statistics.fmean(early), statistics.fmean(known), s=70, marker=marker, color=color, label=name)
        ax.axhline(25, color="grey", lw=0.8, ls=":")
        ax.set(xlabel="loss on the earlier languages, nats a token", ylabel=f"{label}: right of four, %")
    axes[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
