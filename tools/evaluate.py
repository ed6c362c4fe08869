#!/usr/bin/env python
"""Is a model any good, and what did it forget? Of Hugging Face directories and Megatron checkpoints of any layout.

python tools/evaluate.py loss hf-model --texts ja=ja.jsonl en=en/ --output loss.json
python tools/evaluate.py forgetting hf-before runs/sft --texts ja=ja.jsonl en=en.jsonl
python tools/evaluate.py routing runs/moe --texts ja=ja.jsonl en=en.jsonl hi=hi.jsonl --plot routing.png
python tools/evaluate.py probe runs/sft/iter_0001000 --prompts questions.jsonl --chat --texts ja=ja.jsonl
python tools/evaluate.py lm-eval runs/moe --tasks tasks/ --num-fewshot 4
python tools/evaluate.py choose runs/sft --low text/ja/bits_per_byte --high samples/end_of_turn_rate

loss: perplexity and bits per byte of texts. forgetting: how both changed from one model to another. routing: which
experts serve which text. choose: a table of a run's checkpoints and metrics, and the best by a rule. probe: figures of
what one checkpoint writes to fixed prompts and of its loss on texts, as JSON lines. lm-eval: scores of tasks of
lm-evaluation-harness, kept beside the checkpoint. Beside a run, for each checkpoint (several commands joined by &&):

evaluation:
  on_checkpoint: python tools/evaluate.py probe "$CHECKPOINT" --prompts questions.jsonl --chat --texts ja=ja.jsonl
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from megatron_ext.command import chosen_command, ending_on_sigterm, parse_command, run_command
from megatron_ext.config.base import PathName, config
from megatron_ext.errors import ConfigError, note_path
from megatron_ext.evaluation.harness_options import HarnessOptions

if TYPE_CHECKING:
    from megatron_ext.evaluation.text_loss import TextLoss, Windows


@config
class ReadingOptions:
    """How models read texts."""

    texts: list[str] = Field(min_length=1)
    """Texts as NAME=PATH, such as ja=ja.jsonl: files or folders of .jsonl, .json, .txt, these compressed, tables."""
    text_key: str = "text"
    """Key of the text in a JSON object, or its column in a table."""
    documents: int | None = Field(default=None, ge=1)
    """So many documents of each are read, the first ones. Unset: all."""
    window: int | None = Field(default=None, ge=2)
    """Tokens that the model sees at once. Default: as many as its config.json says, at most 2048."""
    stride: int | None = Field(default=None, ge=1)
    """Tokens between the beginnings of two windows of a longer document; each token counts once, predicted from at
    least window - stride before it. Default: half a window."""
    batch_size: int = Field(default=8, ge=1)
    """Windows at once."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to compute, in fp32."""
    trust_remote_code: bool = False
    """Run modelling code inside a Hugging Face directory. Code that this framework shipped needs no trust."""
    output: PathName | None = None
    """JSON file of all figures."""


@config
class LossOptions(ReadingOptions):
    """Options of `loss`."""

    model: PathName
    """Hugging Face directory or Megatron checkpoint (also one of adapters)."""


@config
class ForgettingOptions(ReadingOptions):
    """Options of `forgetting`: both models read the same texts, each in windows of its own tokens."""

    before: PathName
    """The model before: Hugging Face directory or Megatron checkpoint."""
    after: PathName
    """The model after, which may have another tokenizer."""


@config
class ProbeOptions:
    """Options of `probe`."""

    model: PathName
    """Hugging Face directory or Megatron checkpoint (also one of adapters)."""
    prompts: PathName | None = None
    """File of prompts, as tools/generate.py --file reads them. Unset: nothing is written."""
    chat: bool = False
    """Answer prompts as the chat template asks. Conversations are always answered."""
    max_new_tokens: int = Field(default=128, ge=1)
    """Longest text, in tokens."""
    temperature: float = Field(default=0.0, ge=0)
    """0 takes the likeliest token each time; else it is drawn, with the same draws for each checkpoint."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of these draws."""
    texts: list[str] = Field(default_factory=list)
    """Texts as NAME=PATH, whose loss shows what is forgotten."""
    text_key: str = "text"
    """Key of the text in a JSON object, or its column in a table."""
    documents: int = Field(default=100, ge=1)
    """So many documents of each are read, the first ones."""
    window: int | None = Field(default=None, ge=2)
    """As of `loss`."""
    stride: int | None = Field(default=None, ge=1)
    """As of `loss`."""
    batch_size: int = Field(default=8, ge=1)
    """Prompts, or windows of texts, at once."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to compute, in fp32. The devices of the run are busy."""
    trust_remote_code: bool = False
    """Run modelling code inside a Hugging Face directory. Code that this framework shipped needs no trust."""


@config
class RoutingOptions:
    """Options of `routing`."""

    model: PathName
    """Hugging Face directory or Megatron checkpoint (also one of adapters) with experts."""
    texts: list[str] = Field(min_length=1)
    """Texts as NAME=PATH, a language each."""
    text_key: str = "text"
    """Key of the text in a JSON object, or its column in a table."""
    documents: int = Field(default=100, ge=1)
    """So many documents of each are read, the first ones."""
    window: int = Field(default=512, ge=1)
    """Longer documents are cut into pieces of so many tokens."""
    plot: PathName | None = None
    """Image of a heat map for each text, layers by experts: .png, .svg or .pdf."""
    output: PathName | None = None
    """JSON file of every expert's share."""


@config
class ChooseOptions:
    """Options of `choose`."""

    run: PathName
    """Checkpoint directory of a run with evaluation.on_checkpoint, or its metrics.jsonl."""
    low: list[str] = Field(default_factory=list)
    """Metrics that are to be low. Without --low and --high the table alone is shown."""
    high: list[str] = Field(default_factory=list)
    """Metrics that are to be high. The checkpoint of the best mean rank over all of them is chosen, of equal ones the
    later."""
    output: PathName | None = None
    """JSON file of the results, the rule and the order."""


def loss(arguments: Sequence[str]) -> None:
    """Print the loss of one model on texts."""
    o = parse_command(LossOptions, "Perplexity and bits per byte of texts.", positional=["model"], argv=arguments)
    _require_output(o.output)
    windows, found = _losses(o.model, o)
    _table(
        ("text", "documents", "tokens", "bytes", "loss (nats/token)", "perplexity", "bits/byte (95 %)"),
        [
            (
                *(name, f"{len(one.nats):,}", f"{sum(one.tokens):,}", f"{sum(one.bytes):,}"),
                *(f"{one.loss:.4f}", f"{one.perplexity:.4g}", f"{one.bits_per_byte:.4f}{_half(one.bits_interval)}"),
            )
            for name, one in found.items()
        ],
    )
    print(f"windows of {windows.size} tokens, each {windows.stride} further on")
    said = {"model": o.model, "window": windows.size, "stride": windows.stride}
    _write(o.output, {**said, "texts": {name: one.record() for name, one in found.items()}})


def _half(interval: float) -> str:
    """One document alone has no interval."""
    return "" if math.isnan(interval) else f" ± {interval:.4f}"


def forgetting(arguments: Sequence[str]) -> None:
    """Print how the loss on texts changed between two models."""
    o = parse_command(
        ForgettingOptions, "What a model forgot and learned.", positional=["before", "after"], argv=arguments
    )
    _require_output(o.output)
    from megatron_ext.evaluation.forgetting import changes
    from megatron_ext.generation.text_model import require_model

    for name in (o.before, o.after):
        require_model(name)
    (windows, before), (others, after) = _losses(o.before, o), _losses(o.after, o)
    found = changes(before, after)
    _table(
        ("text", "bits/byte before", "after", "difference (95 %)", "relative", ""),
        [
            (
                *(name, f"{one.before:.4f}", f"{one.after:.4f}", f"{one.difference:+.4f}{_half(one.interval)}"),
                *(f"{one.difference / one.before:+.2%}", one.verdict),
            )
            for name, one in found.items()
        ],
    )
    for name, used in ((o.before, windows), (o.after, others)):
        print(f"{name}: windows of {used.size} tokens, each {used.stride} further on")
    said = {"before": o.before, "after": o.after}
    _write(o.output, {**said, "texts": {name: one.record() for name, one in found.items()}})


def routing(arguments: Sequence[str]) -> None:
    """Print which experts serve which text."""
    o = parse_command(RoutingOptions, "Which experts serve which text.", positional=["model"], argv=arguments)
    texts = _by_name(o.texts)
    from megatron_ext.data.inspect.plot import check_plot
    from megatron_ext.evaluation.routing import plot_routing, routing_by_text
    from megatron_ext.evaluation.text_loss import read_texts
    from megatron_ext.generation.text_model import hugging_face_directory
    from megatron_ext.progress import counted

    check_plot(o.plot)
    for path in (o.output, o.plot):
        _require_output(path)
    read = {
        name: counted(read_texts(path, o.documents, o.text_key), f"documents of {name}") for name, path in texts.items()
    }
    with ending_on_sigterm(), hugging_face_directory(o.model) as directory:
        found = routing_by_text(directory, read, o.window)
    rows = []
    for layer in found.shares:
        best = [found.favourites(layer, name) for name in texts]
        said = [", ".join(f"{expert} ({share:.1%})" for expert, share in one) for one in best]
        rows.append((f"{layer}", f"{found.apart(layer):.3f}", *said))
    _table(("layer", "apart", *texts), rows)
    print("apart: 0, all texts are served alike, to 1, each by experts of its own; then the experts most used by each")
    if o.plot is not None:
        plot_routing(found, o.plot)
    apart = {layer: found.apart(layer) for layer in found.shares}
    _write(o.output, {"model": o.model, "apart": apart, "shares": found.shares})


def choose(arguments: Sequence[str]) -> None:
    """Print a run's checkpoints with their metrics, in order of a rule."""
    o = parse_command(ChooseOptions, "The best checkpoint of a run.", positional=["run"], argv=arguments)
    if both := set(o.low) & set(o.high):
        raise ConfigError(f"low, high: {', '.join(sorted(both))} cannot be both")
    _require_output(o.output)
    from megatron_ext.evaluation.choice import choose as choice_of
    from megatron_ext.evaluation.choice import evaluated_results
    from megatron_ext.monitoring.report.evaluations import result_table

    results = evaluated_results(o.run)
    header, rows = result_table(results)
    said: dict[str, Any] = {"results": results}
    if o.low or o.high:
        choice = choice_of(results, {**dict.fromkeys(o.low, "min"), **dict.fromkeys(o.high, "max")})
        by_step = dict(zip(results, rows, strict=True))
        header = ["mean rank", *header]
        rows = [[f"{rank:.2f}", *by_step[step]] for step, rank in choice.ranks.items()]
        rows += [["-", *by_step[step]] for step in choice.left_out]
        said |= {"rule": {"low": o.low, "high": o.high}, "mean_ranks": choice.ranks, "chosen": choice.best}
    _table(header, rows)
    if "chosen" in said:
        print(f"chosen: step {said['chosen']}, by the lowest mean rank (low: {o.low}, high: {o.high})")
    _write(o.output, said)


def probe(arguments: Sequence[str]) -> None:
    """Print figures of one checkpoint as JSON lines."""
    o = parse_command(ProbeOptions, "Figures of one checkpoint as JSON lines.", positional=["model"], argv=arguments)
    if o.prompts is None and not o.texts:
        raise ConfigError("prompts, texts: give at least one of them")
    texts = _by_name(o.texts)
    from megatron_ext.evaluation.probe import probe as metrics_of
    from megatron_ext.evaluation.text_loss import read_texts
    from megatron_ext.generation.prompts import read_prompts
    from megatron_ext.generation.sample import Continuing
    from megatron_ext.generation.sampling import Sampling
    from megatron_ext.generation.text_model import text_model

    prompts = read_prompts(o.prompts, chat=o.chat) if o.prompts else []
    documents = {name: read_texts(path, o.documents, o.text_key) for name, path in texts.items()}
    how = Continuing(Sampling(o.temperature, seed=o.seed), o.max_new_tokens, o.batch_size)
    with (
        ending_on_sigterm(),
        text_model(o.model, trust_remote_code=o.trust_remote_code, device=o.device) as model,
    ):
        for figures in metrics_of(model, prompts, how, documents, window=o.window, stride=o.stride):
            print(json.dumps(figures), flush=True)


def lm_eval(arguments: Sequence[str]) -> None:
    """Print the scores of tasks, as JSON lines too, and keep them beside the checkpoint."""
    o = parse_command(HarnessOptions, "Scores of lm-evaluation-harness.", positional=["model"], argv=arguments)
    from megatron_ext.evaluation.harness import (
        evaluate,
        keep,
        kept_place,
        metrics_of,
        read_tasks,
        require_harness,
        stay_offline,
    )

    if not o.online:
        stay_offline()
    require_harness()
    from megatron_ext.generation.text_model import hugging_face_directory, text_model
    from megatron_ext.monitoring.report.evaluations import result_table

    place = Path(o.output) if o.output else kept_place(o.model)
    _require_output(str(place))
    tasks = read_tasks(o.tasks)  # before a model is exported, which may take long
    with (
        ending_on_sigterm(),
        hugging_face_directory(o.model, verify=o.verify) as directory,
        text_model(directory, trust_remote_code=o.trust_remote_code, device=o.device) as model,
    ):
        found = evaluate(model, tasks, o)
    metrics = metrics_of(found)
    (_, *names), ((_, *cells),) = result_table({0: metrics})
    _table(("metric", "score (95 %)"), list(zip(names, cells, strict=True)))
    print(json.dumps(metrics), flush=True)  # hours of work, whatever becomes of the file
    keep(place, o.model, found, metrics)
    print(f"kept: {place}")


COMMANDS: dict[str, Any] = {
    "loss": (loss, LossOptions),
    "forgetting": (forgetting, ForgettingOptions),
    "routing": (routing, RoutingOptions),
    "probe": (probe, ProbeOptions),
    "lm-eval": (lm_eval, HarnessOptions),
    "choose": (choose, ChooseOptions),
}


def main() -> None:
    """Parse the command line and do what its first word says."""
    options = {name: taken for name, (_, taken) in COMMANDS.items()}
    action, arguments = chosen_command("tools/evaluate.py", __doc__, options)
    COMMANDS[action][0](arguments)


def _losses(name: str, o: ReadingOptions) -> "tuple[Windows, dict[str, TextLoss]]":
    """The loss of the model `name` on each text, and the windows that it was read in."""
    texts = _by_name(o.texts)
    from megatron_ext.evaluation.text_loss import read_texts, text_loss, windows_of
    from megatron_ext.generation.text_model import text_model
    from megatron_ext.progress import counted

    # Before a model is opened, which may take long.
    read = {
        text: counted(read_texts(path, o.documents, o.text_key), f"documents of {text}") for text, path in texts.items()
    }
    with (
        ending_on_sigterm(),
        text_model(name, trust_remote_code=o.trust_remote_code, device=o.device) as model,
    ):
        windows = windows_of(model, o.window, o.stride)
        return windows, {
            text: text_loss(model, documents, windows, batch_size=o.batch_size) for text, documents in read.items()
        }


def _require_output(path: str | None) -> None:
    """Raise where nothing can be written to `path`, before the work is done."""
    from megatron_ext.files import require_writable

    if path is not None:
        require_writable(path)


def _write(path: str | None, content: dict[str, Any]) -> None:
    from megatron_ext.files import write_text

    if path is not None:
        write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*header, box=None)
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _by_name(values: Sequence[str]) -> dict[str, str]:
    """The paths of `NAME=PATH`, by name."""
    found: dict[str, str] = {}
    for value in values:
        name, separator, path = value.partition("=")
        if not (name and separator and path) or name in found:
            raise ConfigError(f"texts = {value!r}: expected NAME=PATH, each name once, such as ja={path or value}")
        note_path(path)
        found[name] = path
    return found


if __name__ == "__main__":
    run_command(main)
