#!/usr/bin/env python
"""One self-contained HTML page about one or more training runs, written to a file or served while they go on.

python tools/report.py runs/dense moe=runs/moe/metrics.jsonl --output report.html
python tools/report.py runs/moe --serve 8000            follow it at http://127.0.0.1:8000/
                                                        (from elsewhere: ssh -L 8000:127.0.0.1:8000 HOST)
"""

from pydantic import Field

from megatron_ext.command import parse_command, run_command
from megatron_ext.config.base import PathName, config
from megatron_ext.errors import ConfigError


@config
class ReportOptions:
    """Options of this command."""

    runs: list[str] = Field(default_factory=list)
    """Training runs in order, by folder, by metrics.jsonl, or as name=either; they share one axis of tokens."""
    metrics: list[str] = Field(default_factory=list)
    """More of them, as older versions took them."""
    output: PathName | None = None
    """HTML file to write."""
    serve: int | None = Field(default=None, ge=0, le=65535)
    """In place of --output: answer at this port of this machine, and follow the runs; 0 takes a free one."""
    title: str = "Training report"
    """Heading of the page."""
    figures: list[PathName] = Field(default_factory=list)
    """JSON files written by tools/upcycle.py --figures and tools/verify.py --figures."""
    generated: PathName | None = None
    """JSON file written by tools/generate.py --output."""


def main() -> None:
    """Parse the command line, and write the page or serve it."""
    o = parse_command(ReportOptions, __doc__, positional=["runs"])
    runs = [*o.runs, *o.metrics]
    if not runs:
        raise ConfigError("runs: name at least one training run, such as runs/dense")
    if (o.output is None) == (o.serve is None):
        raise ConfigError(f"--output {o.output}, --serve {o.serve}: give one of them")
    if o.serve is not None:
        _serve(runs, o.title, o.serve)
    else:
        _write(runs, o)


def _serve(runs: list[str], title: str, port: int) -> None:
    from megatron_ext.monitoring.report.serve import ReportServer

    server = ReportServer(runs, title, port)
    print(f"report: {server.url} (Ctrl-C ends it)", flush=True)
    server.serve()


def _write(runs: list[str], o: ReportOptions) -> None:
    from rich.console import Console
    from rich.table import Table

    from megatron_ext.monitoring.report import SUMMARY_HEADER, figure_lines, read_phases, summary_rows, write_report

    assert o.output is not None
    phases = read_phases(runs)
    write_report(o.output, o.title, phases, o.figures, o.generated)
    table = Table(*SUMMARY_HEADER, box=None)
    for row in summary_rows(phases):
        table.add_row(*row)
    Console(width=110).print(table)
    print(*figure_lines(o.figures), f"report: {o.output}", sep="\n")


if __name__ == "__main__":
    run_command(main)
