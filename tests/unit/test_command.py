"""Options of a command: tagged unions chosen by kind, several sources and one target, files and what wins over them."""

import errno
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from megatron_ext.command import parse_command, run_command, run_parser
from megatron_ext.config.base import config
from megatron_ext.errors import CheckpointError, ConfigError
from megatron_ext.monitoring.sinks.alerts import FLUSH_SECONDS


@config
class Plain:
    """Nothing to choose."""

    kind: Literal["plain"] = "plain"


@config
class Coarse:
    """A grain (Miller et al. 2024).

    And more.
    """

    kind: Literal["coarse"]
    grain: int = Field(default=3, ge=1)
    """Size of a grain."""
    names: list[str] | None = None
    """Names of grains."""


@config
class Fine:
    """A grain and a mesh."""

    kind: Literal["fine"]
    grain: int = 1
    """Size of a grain."""
    mesh: float = 0.5
    """Width of the mesh."""


@config
class Options:
    """Options."""

    sources: list[str] = Field(min_length=1)
    """From where."""
    target: str
    """Where to."""
    method: Annotated[Plain | Coarse | Fine, Field(discriminator="kind")] = Field(default_factory=Plain)
    """How."""


@config
class Numbered:
    """Options of which a number may come without its name."""

    name: str
    """A name."""
    number: int
    """A number."""


def test_a_number_that_is_missing_is_said_to_be() -> None:
    with pytest.raises(ConfigError, match="number: is required"):
        parse_command(Numbered, "A test.", positional=["name", "number"], argv=["x"])


def parse(*argv: str) -> Options:
    return parse_command(Options, "A test.", positional=["sources", "target"], argv=argv)


def test_the_last_of_several_is_the_target() -> None:
    o = parse("a", "b", "c")
    assert (o.sources, o.target) == (["a", "b"], "c")
    with pytest.raises(ConfigError, match="target"):
        parse("a")


def test_a_kind_takes_its_own_options() -> None:
    assert parse("a", "b").method == Plain()
    assert parse("a", "b", "--method", "coarse", "--grain", "5", "--names", "x", "y").method == Coarse(
        kind="coarse", grain=5, names=["x", "y"]
    )
    assert parse("a", "b", "--method", "fine", "--mesh", "0.25").method == Fine(kind="fine", mesh=0.25)


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (("--grain", "5"), "--grain: is an option of --method coarse, fine; this is --method plain"),
        (("--method", "coarse", "--mesh", "1.0"), "--mesh: is an option of --method fine; this is --method coarse"),
        (("--method", "coarse", "--grain", "0"), "method.grain"),
    ],
)
def test_an_option_of_another_kind_is_refused(argv: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse("a", "b", *argv)
    assert complaint in str(error.value)


def test_options_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("sources: [a, b]\ntarget: c\nmethod: {kind: coarse, grain: 7, names: [x]}\n")
    from_file = parse("--config", str(file))
    assert (from_file.sources, from_file.target) == (["a", "b"], "c")
    assert from_file.method == Coarse(kind="coarse", grain=7, names=["x"])
    changed: Any = parse("--config", str(file), "--grain", "2").method
    assert changed == Coarse(kind="coarse", grain=2, names=["x"])
    # Another kind starts from its own defaults.
    assert parse("--config", str(file), "--method", "fine").method == Fine(kind="fine")
    assert parse("d", "e", "--config", str(file)).sources == ["d"]


def test_a_file_that_names_a_kind_alone_is_refused_and_not_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("sources: [a]\ntarget: c\nmethod: fine\n")
    with pytest.raises(ConfigError, match=r"method = 'fine': expected a mapping with its kind, such as \{kind: fine\}"):
        parse("--config", str(file))


def test_help_tells_kinds_and_whose_an_option_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "plain: Nothing to choose; coarse: A grain (Miller et al. 2024); fine: A grain and a mesh" in text
    assert "(default plain)" in text
    # Said once for all kinds that agree, and with each one's own default where they do not.
    assert "[coarse] Size of a grain. (integer, default 3) [fine] Size of a grain. (integer, default 1)" in text
    assert "[fine] Width of the mesh." in text


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/x"),
            f"error: {Path.cwd()}/runs/x: No space left on device; make room",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "error: an output: No space left on device; make room"),
        (
            PermissionError(errno.EACCES, "Permission denied", "runs/x"),
            f"error: {Path.cwd()}/runs/x: Permission denied",
        ),
    ],
)
def test_what_the_system_says_of_files_is_one_message(
    fault: OSError, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise fault

    with pytest.raises(SystemExit) as ended:
        run_command(fail)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(said)


@pytest.mark.parametrize("is_everywhere", [True, False])
def test_what_every_rank_knows_is_said_by_one(
    is_everywhere: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        error = CheckpointError("the checkpoint was not saved")
        error.is_everywhere = is_everywhere
        raise error

    monkeypatch.setattr("time.sleep", lambda seconds: None)
    said = {}
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit) as ended:
            run_command(fail)
        assert ended.value.code == 2
        said[rank] = capsys.readouterr().err
    assert said == {"0": "error: the checkpoint was not saved\n", "1": "" if is_everywhere else said["0"]}


@pytest.mark.parametrize(("signalled", "code"), [(KeyboardInterrupt(), 130), (SystemExit(143), 143)], ids=repr)
def test_a_signal_while_a_class_is_made_ends_the_command(signalled: BaseException, code: int) -> None:
    """Python 3.11 raises another error from it."""

    class Field:
        def __set_name__(self, owner: type, name: str) -> None:
            raise signalled

    with pytest.raises(SystemExit) as ended:
        run_command(lambda: type("Imported", (), {"field": Field()}) and None)
    assert ended.value.code == code


def test_output_that_nobody_reads_to_its_end_is_no_fault() -> None:
    code = "from megatron_ext.command import run_command; run_command(lambda: print('line\\n' * 10**6))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == b"line\n"
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 128 + signal.SIGPIPE


def test_a_name_in_another_encoding_is_printed() -> None:
    code = "import os; from megatron_ext.command import run_command as r; r(lambda: print(os.fsdecode(b'caf\\xe9')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "caf\\udce9\n", "")


def test_overrides_are_no_part_of_what_a_run_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_parser("a tool").parse_args(["run.yaml"]).overrides == []
    with pytest.raises(SystemExit):
        run_parser("a tool").parse_args([])
    assert capsys.readouterr().err.endswith("required: RUN.yaml\n")


@pytest.mark.parametrize("speaks", [True, False])
def test_a_fault_of_all_ranks_leaves_the_one_that_speaks_the_time_to_tell_people(
    speaks: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)

    def refuse() -> None:
        raise ConfigError("no room").everywhere(speaks=speaks)

    with pytest.raises(SystemExit) as end:
        run_command(refuse)
    assert end.value.code == 2
    assert capsys.readouterr().err == ("error: no room\n" if speaks else "")
    assert speaks or sum(slept) > FLUSH_SECONDS
