#!/usr/bin/env python
"""Train a model, or go on training it where it was interrupted.

torchrun --nproc-per-node 8 tools/train.py RUN.yaml [section.key=value ...]
python tools/train.py RUN.yaml                  one process
python tools/train.py RUN.yaml --check          look at the run and at all its files, start nothing

SIGTERM, SIGUSR1, SIGHUP and Ctrl-C finish the step, save and end with 128 + the signal's number (143, 138, 129, 130);
the same command then goes on. Ranks end with torchrun, saving first, and all end with code 2 when one is lost.
"""

import argparse
from collections.abc import Mapping
from typing import Any

from megatron_ext.command import positive_integer, run_command, run_parser
from megatron_ext.config import RunConfig, load_run
from megatron_ext.config.load import read_run_text
from megatron_ext.errors import ConfigError
from megatron_ext.monitoring.refused import alerting_of_refusal


def main() -> None:
    """Parse the command line and train."""
    parser = run_parser(__doc__)
    parser.add_argument(
        "--check", action="store_true", help="print what the run would be and do, and every fault; start nothing"
    )
    parser.add_argument("--world-size", type=positive_integer, metavar="N", help="with --check: number of processes")
    parser.add_argument("--config-only", action="store_true", help="with --check: leave out data, checkpoints and disk")
    parser.add_argument(
        "--alert",
        action="store_true",
        help="with --check: alert the run's people of faults, if it has reported before; for launchers, whose restarts "
        "nobody watches",
    )
    parser.add_argument(
        "--skip-data",
        type=_range,
        action="append",
        default=[],
        metavar="FIRST:LAST",
        help="pass over every step that would read one of these samples, counted from 0 over the run as reports number "
        "them; added to train.skip_samples. Give it again at every start, or write it there",
    )
    arguments = parser.parse_args()
    if arguments.check:
        _skip_data(arguments)
        _check(arguments)
        return
    for option in ("world_size", "config_only", "alert"):
        if getattr(arguments, option):
            option = f"--{option.replace('_', '-')}"
            raise ConfigError(f"{option} needs --check: it says nothing of a run that starts")
    from megatron_ext.launcher import adopt_launcher, end_with_launcher
    from megatron_ext.roll_call import on_every_rank

    adopt_launcher()
    end_with_launcher()
    with alerting_of_refusal(lambda: _valid(arguments)):
        run = on_every_rank("configuration", lambda: _run_of(arguments))
    from megatron_ext.training.watch import watching

    with watching(run) as others:  # what training imports takes the longest part of a start
        from megatron_ext.model_io.starting_weights import open_hugging_face
        from megatron_ext.training.loop import train

        train(run, others, arguments.run, open_hugging_face)


def _range(text: str) -> list[int]:
    """Argument type: FIRST:LAST."""
    first, colon, last = text.replace("_", "").partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
        raise argparse.ArgumentTypeError(f"{text!r}: must be FIRST:LAST, two numbers of samples")
    return [int(first), int(last)]


def _run_of(arguments: argparse.Namespace) -> RunConfig:
    _skip_data(arguments)
    return load_run(arguments.run, arguments.overrides)


def _valid(arguments: argparse.Namespace) -> Mapping[str, Any]:
    """What is right in the configuration, whatever else is not."""
    return read_run_text(arguments.run, arguments.overrides).values


def _skip_data(arguments: argparse.Namespace) -> None:
    """Turn --skip-data into the key that says it, so that checkpoints and reports have it."""
    if arguments.skip_data:
        run = load_run(arguments.run, arguments.overrides)
        arguments.overrides.append(f"train.skip_samples={[*run.train.skip_samples, *arguments.skip_data]}")


def _check(arguments: argparse.Namespace) -> None:
    from megatron_ext.model_io.starting_weights import open_hugging_face
    from megatron_ext.training.startup_checks import check_run

    files = not arguments.config_only
    with alerting_of_refusal(lambda: _valid(arguments), is_asked=arguments.alert):
        said = check_run(
            arguments.run, arguments.overrides, arguments.world_size, files=files, open_foreign=open_hugging_face
        )
    print(said)


if __name__ == "__main__":
    run_command(main)
