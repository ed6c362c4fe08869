#!/usr/bin/env python
"""Continue prompts, or answer as a chat model, with a Hugging Face directory or a Megatron checkpoint of any layout.

python tools/generate.py CHECKPOINT_OR_HF --prompts "Once upon a time"
python tools/generate.py runs/sft --chat --prompts "What is a router?" --stream
python tools/generate.py hf-chat --chat --file questions.jsonl --temperature 0 --output answers.json
python tools/generate.py runs/moe/iter_0001000 --samples runs/moe/iter_000[2-9]000 --file prompts.txt

Where to stop is said by the model's generation_config.json; how to choose the next token, by the options here.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from megatron_ext.command import ending_on_sigterm, parse_command, run_command
from megatron_ext.config.base import PathName, config
from megatron_ext.errors import ConfigError

if TYPE_CHECKING:
    from megatron_ext.generation.prompts import Prompt
    from megatron_ext.generation.sample import Continuation, Continuing
    from megatron_ext.generation.text_model import TextModel


@config
class GenerateOptions:
    """Options of this command."""

    checkpoint: PathName
    """Hugging Face directory or Megatron checkpoint (also one of adapters)."""
    samples: list[PathName] = Field(default_factory=list)
    """More of them, which continue the same prompts with the same draws; shown side by side."""
    prompts: list[str] = Field(default_factory=list)
    """Texts to continue; with --chat, questions, or conversations as JSON lists of messages."""
    file: PathName | None = None
    """More prompts: a line each of a .txt; rows with `prompt`, `text`, `messages`, `conversations`, `instruction` of a
    .jsonl, .json or table. Of a conversation the answer at its end is left out and made anew."""
    chat: bool = False
    """Answer prompts as the chat template asks. Conversations in a file are always answered."""
    system: str | None = None
    """What a system message says before each conversation that has none. Unset: none."""
    chat_template: PathName | None = None
    """Jinja file. Default: the tokenizer's own template."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Longest continuation, in tokens. It ends earlier where the model has learned no more positions."""
    temperature: float = Field(default=0.8, ge=0)
    """Spread of the sampling; 0 takes the likeliest token each time."""
    top_k: int = Field(default=0, ge=0)
    """Sample among so many of the likeliest tokens; 0: among all."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Sample among the likeliest tokens that together have this probability."""
    repetition_penalty: float = Field(default=1.0, gt=0)
    """Above 1, tokens that the prompt or the continuation has are less likely (CTRL, arXiv 1909.05858)."""
    stop: list[str] = Field(default_factory=list)
    """Texts or special tokens that end a continuation too, and are no part of it."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the sampling. Each prompt draws for itself, by its place: the same whatever --batch-size is."""
    batch_size: int = Field(default=8, ge=1)
    """Prompts that are continued at once."""
    stream: bool = False
    """Show each continuation while it is made, one after the other."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to compute, in fp32."""
    trust_remote_code: bool = False
    """Run modelling code inside a Hugging Face directory. Code that this framework shipped needs no trust."""
    output: PathName | None = None
    """JSON file for prompts and continuations."""


def main() -> None:
    """Parse the command line and generate."""
    o = parse_command(GenerateOptions, __doc__, positional=["checkpoint"])
    _check(o)
    from megatron_ext.files import require_writable, write_text
    from megatron_ext.generation.text_model import require_model

    if o.output:
        require_writable(o.output)
    for name in (o.checkpoint, *o.samples):
        require_model(name)
    prompts, how = _prompts(o), _how(o)
    rows: list[dict[str, Any]] = []
    with ending_on_sigterm():  # which removes the temporary model
        for name in [o.checkpoint, *o.samples]:
            rows += _rows(name, prompts, how, o)
    if o.samples:
        _show_side_by_side(rows, [o.checkpoint, *o.samples])
    if o.output:
        write_text(o.output, json.dumps(rows, ensure_ascii=False, indent=2) + "\n")


def _check(o: GenerateOptions) -> None:
    if not o.prompts and o.file is None:
        raise ConfigError("prompts: give texts to continue (--prompts), or a file of them (--file)")
    if o.system is not None and not (o.chat or o.file):
        raise ConfigError(f"system = {o.system!r}: is of conversations; add --chat")
    if o.chat_template is not None and not (o.chat or o.file):
        raise ConfigError(f"chat_template = {o.chat_template!r}: is of conversations; add --chat")
    if o.stream and o.samples:
        raise ConfigError("stream = True: shows one model's text; leave it out, or --samples")


def _prompts(o: GenerateOptions) -> "list[Prompt]":
    from megatron_ext.generation.prompts import command_line_prompts, read_prompts

    prompts = command_line_prompts(o.prompts, chat=o.chat, system=o.system)
    return prompts + (read_prompts(o.file, chat=o.chat, system=o.system) if o.file else [])


def _rows(name: str, prompts: "Sequence[Prompt]", how: "Continuing", o: GenerateOptions) -> list[dict[str, Any]]:
    """What the model `name` makes of the prompts, for the output; it is shown where there is no other model."""
    from megatron_ext.generation.sample import continued
    from megatron_ext.generation.text_model import text_model
    from megatron_ext.progress import counted

    with text_model(name, trust_remote_code=o.trust_remote_code, device=o.device) as model:
        if o.samples:
            made = list(counted(continued(model, prompts, how), f"continuations by {name}"))
        else:
            made = list(_shown(model, prompts, how, stream=o.stream))
    return [_row(one, name, o) for one in made]


def _shown(
    model: "TextModel", prompts: "Sequence[Prompt]", how: "Continuing", *, stream: bool
) -> "Iterator[Continuation]":
    """The continuations, shown as soon as they are there."""
    from megatron_ext.generation.sample import continued

    if not stream:
        for made in continued(model, prompts, how):
            print(f"{made.prompt.text}>>>{made.text}\n")
            yield made
        return
    for number, prompt in enumerate(prompts):
        print(f"{prompt.text}>>>", end="", flush=True)
        yield from continued(model, [prompt], how, write=_write_at_once, first=number)
        print("\n")


def _how(o: GenerateOptions) -> "Continuing":
    from megatron_ext.data.prepare.chat_template import read_template
    from megatron_ext.generation.sample import Continuing
    from megatron_ext.generation.sampling import Sampling

    template = read_template(o.chat_template) if o.chat_template else None
    sampling = Sampling(o.temperature, o.top_k, o.top_p, o.repetition_penalty, o.seed)
    return Continuing(sampling, o.max_new_tokens, o.batch_size, o.stop, template)


def _write_at_once(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _row(made: "Continuation", name: str, o: GenerateOptions) -> dict[str, Any]:
    row: dict[str, Any] = {"prompt": made.prompt.text, "continuation": made.text}
    if made.prompt.conversation is not None:
        row["messages"] = list(made.prompt.conversation.messages)
    row |= {"tokens": made.tokens, "ended": made.ended}
    return {"checkpoint": name, **row} if o.samples else row


def _show_side_by_side(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    """On a terminal a column for each model; elsewhere a line for each continuation."""
    count = len(rows) // len(names)
    if not sys.stdout.isatty():
        for n in range(count):
            for row in rows[n::count]:
                print(f"[{row['checkpoint']}] {row['prompt']}>>>{row['continuation']}")
            print()
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("prompt", *(Path(name).name for name in names), show_lines=True)
    for n in range(count):
        table.add_row(Text(rows[n]["prompt"]), *(Text(row["continuation"]) for row in rows[n::count]))
    Console().print(table)


if __name__ == "__main__":
    run_command(main)
