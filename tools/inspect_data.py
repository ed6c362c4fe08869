#!/usr/bin/env python
"""Look at prepared data: what is in it, and what a run reads of it.

python tools/inspect_data.py documents data/ja/train --tokenizer tok           documents as text
python tools/inspect_data.py rows data/chat/train --tokenizer tok              conversations, and what is trained on
python tools/inspect_data.py lengths data/*/train.bin --plot lengths.png       how long they are
python tools/inspect_data.py mix data/*/train.bin --tokenizer tok              tokens and scripts of each dataset
python tools/inspect_data.py plan RUN.yaml [section.key=value ...]             what each stage of a run will read
python tools/inspect_data.py step RUN.yaml 1200 [section.key=value ...]        what that step of a run reads

A dataset is given as in `data.train`, or by its .bin, so that a shell can list them.
"""

import difflib
import sys
from collections.abc import Callable, Iterator, Sequence

from megatron_ext.command import parse_command, run_command
from megatron_ext.config import load_run
from megatron_ext.config.base import fields_of
from megatron_ext.data.inspect.options import (
    DocumentsOptions,
    LengthsOptions,
    MixOptions,
    PlanOptions,
    RowsOptions,
    StepOptions,
)
from megatron_ext.errors import ConfigError


def _documents(argv: Sequence[str]) -> Iterator[str]:
    o = parse_command(DocumentsOptions, __doc__, positional=["prefix"], argv=argv)
    from megatron_ext.data.inspect.documents import show_documents

    return show_documents(o)


def _rows(argv: Sequence[str]) -> Iterator[str]:
    o = parse_command(RowsOptions, __doc__, positional=["prefix"], argv=argv)
    from megatron_ext.data.inspect.rows import show_rows

    return show_rows(o, coloured=sys.stdout.isatty())


def _lengths(argv: Sequence[str]) -> Iterator[str]:
    o = parse_command(LengthsOptions, __doc__, positional=["prefixes"], argv=argv)
    from megatron_ext.data.inspect.lengths import show_lengths

    return show_lengths(o)


def _mix(argv: Sequence[str]) -> Iterator[str]:
    o = parse_command(MixOptions, __doc__, positional=["prefixes"], argv=argv)
    from megatron_ext.data.inspect.mix import show_mix

    return show_mix(o)


def _plan(argv: Sequence[str]) -> Iterator[str]:
    o = parse_command(PlanOptions, __doc__, positional=["run", "overrides"], argv=argv)
    run = load_run(o.run, o.overrides)
    from megatron_ext.training.show_plan import show_plan

    return show_plan(run, o.run)


def _step(argv: Sequence[str]) -> Iterator[str]:
    o = parse_command(StepOptions, __doc__, positional=["run", "step", "overrides"], argv=argv)
    run = load_run(o.run, o.overrides)
    from megatron_ext.training.step_contents import show_step

    return show_step(run, o.step, most=o.samples, characters=o.characters, coloured=sys.stdout.isatty())


COMMANDS: dict[str, Callable[[Sequence[str]], Iterator[str]]] = {
    "documents": _documents,
    "rows": _rows,
    "lengths": _lengths,
    "mix": _mix,
    "plan": _plan,
    "step": _step,
}
"""Each reads its own arguments, and gives out what is printed line by line."""
OPTIONS = {
    "documents": DocumentsOptions,
    "rows": RowsOptions,
    "lengths": LengthsOptions,
    "mix": MixOptions,
    "plan": PlanOptions,
    "step": StepOptions,
}


def main() -> None:
    """Parse the command line and print what was asked for."""
    action, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    if action in ("", "-h", "--help"):
        print(__doc__)
        for name, options in OPTIONS.items():
            print(f"{name}: {', '.join(fields_of(options)).replace('_', '-')}")
        print(f"\nWhat they mean: tools/inspect_data.py COMMAND --help, with one of {', '.join(COMMANDS)}")
        sys.exit(2 if action == "" else 0)
    if action not in COMMANDS:
        close = difflib.get_close_matches(action, COMMANDS, n=1)
        meant = f"; did you mean {close[0]}?" if close else "."
        raise ConfigError(f"tools/inspect_data.py {action}: no such command{meant} It has: {', '.join(COMMANDS)}")
    for line in COMMANDS[action](arguments):
        print(line)


if __name__ == "__main__":
    run_command(main)
