"""What every command line shares: options made from a configuration, help that teaches, and exit codes."""

import argparse
import difflib
import errno
import io
import itertools
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, NoReturn, TypeVar

from megatron_ext.config.base import fields_of
from megatron_ext.config.help import describe_keys, plain, summary_of, type_name
from megatron_ext.config.load import kind_of, load_config, section_types
from megatron_ext.config.root import RunConfig
from megatron_ext.config.yaml_text import parse_scalar, read_yaml
from megatron_ext.errors import ConfigError, MegatronExtError, note_path, with_absolute_paths

T = TypeVar("T")


class _Parser(argparse.ArgumentParser):
    """argparse that keeps the layout of long texts and takes options and values in any order."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        return self.parse_intermixed_args(args, namespace)


def run_command(main: Callable[[], None]) -> NoReturn:
    """Run `main`; a fault of the user's ends with one message on stderr and exit code 2, Ctrl-C with 130."""
    _say_whose_package_runs()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be in any encoding
    try:
        with _not_disguised():
            main()
        sys.stdout.flush()  # it may be a file on a full disk
    except MegatronExtError as error:
        _fail(str(error), is_everywhere=error.is_everywhere, speaks=error.speaks)
    except BrokenPipeError:
        # Whoever read the output has seen enough, as `head`. Python would say so again when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.filename is None and error.errno not in _NO_ROOM:
            raise  # not about a file: a fault of ours, or of the network
        _fail(_said(error))
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


@contextmanager
def _not_disguised() -> Iterator[None]:
    """Raise the signal itself where a fault is only what was made of it.

    A signal within an import may come while a class names its attributes: Python 3.11 says that this failed.
    """
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, KeyboardInterrupt | SystemExit):
                raise cause from None
            cause = cause.__cause__
        raise


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _said(error: OSError) -> str:
    """What the system says of a file, for people."""
    # Of a file that was to be renamed people know the new name.
    known = error.filename2 or error.filename
    place = "an output" if known is None else os.path.abspath(os.fsdecode(known))
    way_out = "; make room there and start again" if error.errno in _NO_ROOM else ""
    return f"{place}: {error.strerror}{way_out}"


def _say_whose_package_runs() -> None:
    """Say it where the tool is of one checkout and its package of another, as with another checkout's environment."""
    script = getattr(sys.modules["__main__"], "__file__", None)
    if script is None or os.environ.get("RANK", "0") != "0":
        return
    checkout, package = Path(script).resolve().parent.parent, Path(__file__).resolve().parent
    if (checkout / package.name / "__init__.py").is_file() and checkout != package.parent:
        print(f"note: {script} runs with the package {package}, not with that of {checkout}", file=sys.stderr)


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


@contextmanager
def script_runs_once() -> Iterator[None]:
    """While inside, processes that begin do not run the command's script again, as multiprocessing would have it.

    Running it means importing all that a command line is made of. What is sent to them must not be of that script.
    """
    script, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


_OTHERS_SPEAK, _OTHERS_TELL = 5.0, 25.0
"""Seconds that this rank leaves to the one that speaks, which may tell people first; a launcher ends it then."""


def _fail(message: str, *, is_everywhere: bool = False, speaks: bool | None = None) -> NoReturn:
    # Most faults meet every rank. A launcher ends the others once one has exited: before they repeat what it said.
    if speaks is None:
        speaks = os.environ.get("LOCAL_RANK", "0") == "0"
    if not speaks:
        time.sleep(_OTHERS_TELL if is_everywhere else _OTHERS_SPEAK)
    if speaks or not is_everywhere:
        print(f"error: {with_absolute_paths(message)}", file=sys.stderr)
    sys.exit(2)


def positive_integer(text: str) -> int:
    """Argument type: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number of at least 1")
    return int(text)


def path_name(text: str) -> str:
    """Argument type: a path, which messages give absolute."""
    note_path(text)
    return text


def run_parser(description: str) -> argparse.ArgumentParser:
    """A parser for commands about a training run: RUN.yaml and `section.key=value` overrides."""
    parser = _Parser(description=description, epilog="Keys of RUN.yaml:\n\n" + describe_keys(RunConfig))
    parser.add_argument("run", metavar="RUN.yaml", type=path_name, help="the run's configuration")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="replace single keys")
    return parser


def parse_command(
    cls: type[T], description: str, *, positional: Sequence[str] = (), argv: Sequence[str] | None = None
) -> T:
    """Read a `cls` from `--config FILE` and options named after its fields; options win.

    A field that is a tagged union is chosen by kind (`--method drop`). What the kinds have for fields are options as
    well (`--ratio 0.5`), and refused where the chosen kind has no such field.

    Args:
        positional: fields that may also be given without a name, in order; one that is a list takes several. Where the
            next one is not a list, the last value is its: SOURCE... TARGET.
    """
    parser = _Parser(description=description)
    parser.add_argument(
        "--config", metavar="FILE.yaml", type=path_name, help="read options from a file; those given here win"
    )
    unions = {name: info for name, info in fields_of(cls).items() if section_types(info.annotation)}
    for name, info in fields_of(cls).items():
        if name in unions:
            _add_union(parser, name, info)
        else:
            settings, option = _argument(name, info, is_positional=False), f"--{name.replace('_', '-')}"
            if name in positional:
                parser.add_argument(name, **_argument(name, info, is_positional=True))
                settings |= {"dest": name, "help": argparse.SUPPRESS}
            parser.add_argument(option, **settings)
    # argparse gives what stands for "no default" to the type of a positional, and does not know it again.
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value != argparse.SUPPRESS}
    file = given.pop("config")
    for several, last in itertools.pairwise(positional):
        if isinstance(given.get(several), list) and len(given[several]) > 1 and last not in given:
            given[last] = given[several].pop()
    raw = read_yaml(file) if file else {}
    if not isinstance(raw, dict):
        return load_config(cls, raw, source=file or parser.prog)
    for name, info in unions.items():
        _choose_kind(name, info, given, raw)
    return load_config(cls, {**raw, **given}, source=file or parser.prog)


def chosen_command(tool: str, about: str, options: Mapping[str, type]) -> tuple[str, list[str]]:
    """The first word of a command line that has several commands, and the arguments behind it.

    Without one, or where help is asked for, say what there is and exit.

    Args:
        tool: its name, for messages.
        about: printed before the list.
        options: by command, the configuration that it takes.

    Raises:
        ConfigError: there is no such command.
    """
    action, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    if action in ("", "-h", "--help"):
        print(about)
        for name, taken in options.items():
            print(f"{name}: {', '.join(fields_of(taken)).replace('_', '-')}")
        print(f"\nWhat they mean: {tool} COMMAND --help, with one of {', '.join(options)}")
        sys.exit(2 if action == "" else 0)
    if action not in options:
        close = difflib.get_close_matches(action, options, n=1)
        meant = f"; did you mean {close[0]}?" if close else "."
        raise ConfigError(f"{tool} {action}: no such command{meant} It has: {', '.join(options)}")
    return action, arguments


def _add_union(parser: argparse.ArgumentParser, name: str, info: Any) -> None:
    """Add the choice of a kind, and the fields of all kinds."""
    kinds = {kind_of(section): section for section in section_types(info.annotation)}
    summaries = "; ".join(f"{kind}: {summary_of(section)}" for kind, section in kinds.items())
    default = "required" if info.is_required() else f"default {info.get_default(call_default_factory=True).kind}"
    text = f"{info.description or ''} {summaries} ({default})"
    parser.add_argument(f"--{name}", choices=list(kinds), default=argparse.SUPPRESS, help=text.replace("%", "%%"))
    group = parser.add_argument_group(f"options of --{name}")
    for field, owners in _owners(info).items():
        settings = _argument(field, fields_of(kinds[owners[0]])[field], is_positional=False)
        said: dict[str, list[str]] = {}
        for owner in owners:
            text = _argument(field, fields_of(kinds[owner])[field], is_positional=False)["help"]
            said.setdefault(text, []).append(owner)
        settings["help"] = " ".join(f"[{', '.join(sayers)}] {text}" for text, sayers in said.items())
        group.add_argument(f"--{field.replace('_', '-')}", **settings)


def _choose_kind(name: str, info: Any, given: dict[str, Any], raw: dict[str, Any]) -> None:
    """Move what was given for the union `name` into one mapping, beside what the file says of the same kind."""
    options = {field: given.pop(field) for field in _owners(info) if field in given}
    in_file = raw.get(name) or {}
    if not isinstance(in_file, dict):
        raise ConfigError(f"{name} = {in_file!r}: expected a mapping with its kind, such as {{kind: {in_file}}}")
    kind = given.pop(name, None) or in_file.get("kind")
    if kind is None and not info.is_required():
        kind = info.get_default(call_default_factory=True).kind
    for field in options:
        if kind not in (owners := _owners(info)[field]):
            flag = f"--{field.replace('_', '-')}"
            raise ConfigError(f"{flag}: is an option of --{name} {', '.join(owners)}; this is --{name} {kind}")
    if kind is not None:
        kept = in_file if in_file.get("kind") == kind else {}
        given[name] = {"kind": kind, **kept, **options}


def _owners(info: Any) -> dict[str, list[str]]:
    """The kinds that have each field."""
    owners: dict[str, list[str]] = {}
    for section in section_types(info.annotation):
        for field in fields_of(section):
            if field != "kind":
                owners.setdefault(field, []).append(kind_of(section))
    return owners


def _argument(name: str, info: Any, *, is_positional: bool) -> dict[str, Any]:
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
