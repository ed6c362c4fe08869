#!/usr/bin/env python
"""Can we train this on our GPUs in our weeks, and how? All legal layouts, with memory, time and the tokens they reach.

python tools/plan.py RUN.yaml --gpus 32 --gpu h100 --days 14                       the best five, as a table
python tools/plan.py RUN.yaml --gpus 32 --gpu h100 --days 14 --write planned.yaml  the best of them, to train as it is
python tools/plan.py model.yaml --gpus 64 --days 30 --tokens 1e12                  a model's shape alone (model: ...)

Nothing is started and no GPU is needed. Layouts are those that the rules of --check allow; memory is checked against
counted tensors, and a step's time on one GPU against measured ones (benchmarks/RESULTS.md); on several GPUs times are
predictions, made of the assumptions that are printed with them. --assumptions FILE.yaml changes those: any of the keys
printed. Measure a few steps of the chosen layout before you trust a date. Exit code 1: no layout fits.
"""

import argparse
import math
import sys
from pathlib import Path

from megatron_ext.command import path_name, positive_integer, run_command, run_parser
from megatron_ext.config.yaml_text import parse_scalar
from megatron_ext.errors import ConfigError

MOST_TOKENS = 1e16
"""Thirty times all public text (3e14 tokens: Villalobos et al. 2024, arXiv 2211.04325)."""
NONE_FITS = 1
"""Exit code: the answer is no. What cannot be planned at all, as with layouts that no rule allows, has 2."""


def main() -> None:
    """Parse the command line and plan."""
    parser = run_parser(__doc__)
    parser.add_argument("--gpus", type=positive_integer, required=True, metavar="N", help="GPUs in all")
    parser.add_argument("--gpu", default="h100", help="kind: h100, h200, b200 or a100 (h100)")
    parser.add_argument("--days", type=_positive, default=14.0, help="days of training (14)")
    parser.add_argument("--tokens", type=_tokens, help="tokens wanted (default: those of the run), such as 2e12")
    parser.add_argument("--assumptions", type=path_name, metavar="FILE.yaml", help="rates and sizes to take instead")
    parser.add_argument("--best", type=positive_integer, default=5, metavar="N", help="layouts to show (5)")
    parser.add_argument("--write", type=path_name, metavar="FILE.yaml", help="write the run in the chosen layout")
    parser.add_argument("--choose", type=positive_integer, metavar="N", help="with --write: which of the table (1)")
    parser.add_argument("--plot", type=path_name, metavar="FILE.png", help="memory and tokens a day of those shown")
    parser.add_argument("--dense-tokens", type=_tokens, metavar="N", help="of the dense model it is upcycled from")
    _plan(parser.parse_args())


def _positive(text: str) -> float:
    number = parse_scalar(text)
    if not isinstance(number, int | float) or isinstance(number, bool) or not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number above 0")
    return float(number)


def _tokens(text: str) -> float:
    number = _positive(text)
    if number > MOST_TOKENS:
        raise argparse.ArgumentTypeError(f"{text!r}: more than {MOST_TOKENS:g} tokens; there is not so much text")
    return number


def _plan(arguments: argparse.Namespace) -> None:
    from megatron_ext.data.inspect.plot import check_plot
    from megatron_ext.planning.assumptions import assumptions_for
    from megatron_ext.planning.plan_run import planned_run, require_new, run_to_plan, write_planned
    from megatron_ext.planning.plan_text import advice, table
    from megatron_ext.planning.run_length import run_length, with_tokens
    from megatron_ext.planning.search import search
    from megatron_ext.training.planned import expected_plan

    check_plot(arguments.plot)
    if arguments.write:
        require_new(arguments.write)
    elif arguments.choose is not None:
        raise ConfigError(f"--choose {arguments.choose}: says which layout --write FILE.yaml writes; give both or none")
    run = run_to_plan(arguments.run, arguments.overrides)
    uses_te = run.runtime.backend == "transformer_engine"
    assumed = assumptions_for(arguments.gpu, arguments.assumptions, transformer_engine=uses_te)
    length = run_length(run, expected_plan(run))
    if arguments.tokens is not None:
        length = with_tokens(run, length, arguments.tokens)
    said = advice(run, length, arguments.dense_tokens)
    found = search(run, arguments.gpus, assumed, best=arguments.best, length=length)
    print(table(run, found, arguments.gpus, assumed, arguments.days, length))
    print(said)
    if not found.chosen:
        for option, path in (("--plot", arguments.plot), ("--write", arguments.write)):
            if path:
                print(f"{option:<16}no layout fits, so {path} is not written")
        sys.exit(NONE_FITS)
    if arguments.plot:
        from megatron_ext.planning.plan_plot import draw

        draw(found, assumed, arguments.plot)
        print(f"plot            {Path(arguments.plot).absolute()}")
    if arguments.write:
        number = arguments.choose or 1
        write_planned(planned_run(found, number, arguments.tokens), arguments.write)
        print(f"written         {Path(arguments.write).absolute()}: layout {number} of the table")
        if run.data.stages and arguments.tokens is not None:
            print("                with the stages as they are: they say how long it is, and --tokens changes none")


if __name__ == "__main__":
    run_command(main)
