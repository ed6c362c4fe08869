"""What every command line shares: options made from a configuration, help that teaches, and exit codes."""

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn, TypeVar

from megatron_ext.config.help import describe_keys, plain, type_name
from megatron_ext.config.load import fields_of, load_config, section_types
from megatron_ext.config.root import RunConfig
from megatron_ext.config.yaml_text import parse_scalar, read_yaml
from megatron_ext.errors import MegatronExtError

T = TypeVar("T")


class _Parser(argparse.ArgumentParser):
    """argparse that keeps the layout of long texts and takes options and values in any order."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        return self.parse_intermixed_args(args, namespace)


def run_command(main: Callable[[], None]) -> NoReturn:
    """Run `main`; a fault of the user's ends with one message on stderr and exit code 2, Ctrl-C with 130."""
    try:
        main()
    except MegatronExtError as error:
        _fail(str(error))
    except OSError as error:
        if error.filename is None:
            raise  # not about a file: a fault of ours, or of the network
        _fail(f"{error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def prefer_huge_pages() -> None:
    """Let torch ask for its memory in large pages, so that new tensors cost half the time; before torch is imported."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


@contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """While inside, SIGTERM ends the command as Ctrl-C does, so that it removes what is not finished; exit code 143."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        print("terminated", file=sys.stderr)
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(message: str) -> NoReturn:
    # Most faults meet every rank. A launcher ends the others once one has exited: before they repeat what it said.
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(5)
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def positive_integer(text: str) -> int:
    """Argument type: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number of at least 1")
    return int(text)


def run_parser(description: str) -> argparse.ArgumentParser:
    """A parser for commands about a training run: RUN.yaml and `section.key=value` overrides."""
    parser = _Parser(description=description, epilog="Keys of RUN.yaml:\n\n" + describe_keys(RunConfig))
    parser.add_argument("run", metavar="RUN.yaml", help="the run's configuration")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replace single keys")
    return parser


def parse_command(
    cls: type[T], description: str, *, positional: Sequence[str] = (), argv: Sequence[str] | None = None
) -> T:
    """Read a `cls` from `--config FILE` and options named after its fields; options win.

    Args:
        positional: fields that may also be given without a name, in order; one that is a list takes several.
    """
    parser = _Parser(description=description)
    parser.add_argument("--config", metavar="FILE.yaml", help="read options from a file; those given here win")
    for name, info in fields_of(cls).items():
        flag = name if name in positional else f"--{name.replace('_', '-')}"
        parser.add_argument(flag, **_argument(name, info, is_positional=name in positional))
    given = vars(parser.parse_args(argv))
    file = given.pop("config")
    raw = read_yaml(file) if file else {}
    return load_config(cls, {**raw, **given} if isinstance(raw, dict) else raw, source=file or parser.prog)


def _argument(name: str, info: Any, *, is_positional: bool) -> dict[str, Any]:
    assert not section_types(info.annotation), f"{name}: options are flat"
    default = "required" if info.is_required() else f"default {plain(info.get_default(call_default_factory=True))}"
    description = f"{info.description or ''} ({type_name(info.annotation)}, {default})"
    settings: dict[str, Any] = {"default": argparse.SUPPRESS, "help": description.replace("%", "%%")}
    is_list = type_name(info.annotation).startswith("list")
    if info.annotation is bool and not is_positional:
        return {**settings, "action": argparse.BooleanOptionalAction}
    settings["type"] = str if _is_text(info.annotation) else parse_scalar
    settings["metavar"] = name.upper()
    if is_list:
        settings["nargs"] = "*" if is_positional else "+"
    elif is_positional:
        settings["nargs"] = "?"
    return settings


def _is_text(annotation: Any) -> bool:
    return "string" in type_name(annotation)
