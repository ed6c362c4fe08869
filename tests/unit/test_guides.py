"""README, CONTRIBUTING and docs/ speak of files, keys and options that exist."""

import argparse
import dataclasses
import importlib
import re
import shlex
import sys
import typing
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.architectures.registry import architecture_for
from megatron_ext.command import parse_command, run_parser
from megatron_ext.config import ModelConfig, RunConfig, load_config
from megatron_ext.config.alerts import AlertKind
from megatron_ext.config.yaml_text import parse_yaml
from megatron_ext.errors import ConfigError
from tests.conftest import ROOT

GUIDES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SECTIONS = typing.get_type_hints(RunConfig)
NO_KEYS = {"md", "py", "yaml", "bin", "idx", "mask", "weights"}
"""Endings of files that are called as a section is."""


def keys_of(kind: object) -> set[str]:
    """The names of all fields of a section, whichever of its kinds has them."""
    if dataclasses.is_dataclass(kind):
        return {field.name for field in dataclasses.fields(kind)}
    return set().union(*map(keys_of, typing.get_args(kind)))


def options() -> set[str]:
    """The options of all command lines, as they are written there."""
    sources = [*ROOT.glob("tools/*.py"), *ROOT.glob("megatron_ext/**/options.py"), ROOT / "megatron_ext" / "command.py"]
    sources += [*ROOT.glob("megatron_ext/upcycling/methods/*.py"), *ROOT.glob("megatron_ext/merging/*.py")]
    sources += [*ROOT.glob("megatron_ext/**/*_options.py")]
    text = "\n".join(path.read_text() for path in sources)
    fields = {name.replace("_", "-") for name in re.findall(r"^    (\w+): ", text, re.MULTILINE)}
    return fields | set(re.findall(r'"--([\w-]+)"', text))


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)
def test_files_that_are_named_exist(guide: Path) -> None:
    text = guide.read_text()
    # In backticks or as a link; only below what is a folder here, so that paths of a reader's own are left out.
    named = re.findall(r"`([\w.-]+/[\w./-]*)`", text) + re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", text)
    places = (ROOT, ROOT / "megatron_ext", guide.parent)
    lost = [
        name
        for name in named
        if any((place / name.split("/")[0]).exists() for place in places) and not name.startswith("build/")
        if ".X." not in name
        if not any((place / name).exists() for place in places)
    ]
    assert not lost


def test_the_page_for_long_runs_says_what_each_alert_means() -> None:
    rows = re.findall(r"^\| (`.+?) \|", (ROOT / "docs" / "long-runs.md").read_text(), re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(named) == sorted(typing.get_args(AlertKind)), "each once"


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)
def test_keys_of_a_run_that_are_named_exist(guide: Path) -> None:
    text = "\n".join(line for line in guide.read_text().splitlines() if "unknown key" not in line)
    named = re.findall(rf"(?<![\w./-])({'|'.join(SECTIONS)})\.([a-z]\w+)(?!\w*[/(.]\w)", text)
    known = {section: keys_of(kind) for section, kind in SECTIONS.items()}
    assert not [f"{section}.{key}" for section, key in named if key not in known[section] | NO_KEYS]


def test_the_page_of_the_model_has_every_key() -> None:
    text = (ROOT / "docs" / "model.md").read_text()
    keys = re.findall(r"`(\w+)", "\n".join(re.findall(r"^\|.*\|(.+)\|$", text, re.MULTILINE)))
    keys += re.findall(r"^  (\w+):", text, re.MULTILINE)
    assert set(keys) == {field.name for field in dataclasses.fields(ModelConfig)}


def test_the_models_of_that_page_are_of_the_classes_that_it_says() -> None:
    examples = re.findall(r"```yaml\n# (\w+)\n(.+?)```", (ROOT / "docs" / "model.md").read_text(), re.DOTALL)
    assert examples
    for hf_class, run in examples:
        model = load_config(ModelConfig, parse_yaml(run, source=hf_class)["model"], source=hf_class)
        assert architecture_for(model)[0].hf_class == hf_class


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)
def test_options_of_tools_that_are_named_exist(guide: Path) -> None:
    lines = [
        line for line in guide.read_text().splitlines() if re.search(r"(tools/|convert|upcycle|train)(\w*)\.py", line)
    ]
    named = {name for line in lines for name in re.findall(r"(?<![\w-])--([a-z][\w-]+)", line)}
    not_ours = {"nproc-per-node", "dist-ckpt-strictness", "help", "config"}
    assert not named - options() - not_ours


def _command_lines() -> list[tuple[str, list[str]]]:
    """The tool and the arguments of every command line that guides, tools and examples give."""
    texts = [*GUIDES, *ROOT.glob("tools/*.py"), *ROOT.glob("examples/*/*.yaml"), *ROOT.glob("examples/filters/*.py")]
    found = []
    for path in texts:
        text = re.sub(r"\s*\\\n[#\s]*", " ", path.read_text())
        for tool, line in re.findall(r"^[# ]*(?:for .*; do )?python tools/(\w+)\.py (.*)$", text, re.MULTILINE):
            line = re.split(r"  +|; done|\s#", line.replace("[", "").replace("]", ""))[0].rstrip("`")
            found.append((tool, ["8" if word == "N" else word for word in shlex.split(line)]))
    return found


class _ReadError(Exception):
    """A command line was read."""


def test_command_lines_that_are_named_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = list(_command_lines())
    assert len(lines) > 30
    wrong = []

    def read(*args: Any, **keywords: Any) -> None:
        parse_command(*args, **keywords)
        raise _ReadError

    def reading_parser(doc: str) -> argparse.ArgumentParser:
        parser = run_parser(doc)
        parse = parser.parse_args

        def parse_and_stop(*args: Any) -> None:
            parse(*args)
            raise _ReadError

        monkeypatch.setattr(parser, "parse_args", parse_and_stop)
        return parser

    for tool, line in lines:
        module = importlib.import_module(f"tools.{tool}")
        name, reader = ("run_parser", reading_parser) if hasattr(module, "run_parser") else ("parse_command", read)
        monkeypatch.setattr(module, name, reader)
        monkeypatch.setattr(sys, "argv", [f"{tool}.py", *line])
        try:
            module.main()
        except _ReadError:
            continue
        except (SystemExit, ConfigError) as error:
            wrong.append(f"{tool}.py {' '.join(line)}: {error}")
    assert not wrong


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 250
