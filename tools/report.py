#!/usr/bin/env python
"""Write one self-contained HTML page about one or more training runs, and print their summary.

python tools/report.py runs/moe --output report.html
python tools/report.py dense=runs/dense/metrics.jsonl moe=runs/moe --output report.html
"""

from pydantic import Field

from megatron_ext.command import parse_command, run_command
from megatron_ext.config.base import PathName, config


@config
class ReportOptions:
    """Options of this command."""

    metrics: list[str] = Field(min_length=1)
    """Training runs in order, by folder, by metrics.jsonl, or as name=either; they share one axis of tokens."""
    output: PathName
    """HTML file to write."""
    title: str = "Training report"
    """Heading of the page."""
    figures: list[PathName] = Field(default_factory=list)
    """JSON files written by tools/upcycle.py --figures and tools/verify.py --figures."""
    generated: PathName | None = None
    """JSON file written by tools/generate.py --output."""


def main() -> None:
    """Parse the command line and write the page."""
    o = parse_command(ReportOptions, __doc__, positional=["metrics"])
    from rich.console import Console
    from rich.table import Table

    from megatron_ext.monitoring.report import SUMMARY_HEADER, figure_lines, read_phases, summary_rows, write_report

    phases = read_phases(o.metrics)
    write_report(o.output, o.title, phases, o.figures, o.generated)
    table = Table(*SUMMARY_HEADER, box=None)
    for row in summary_rows(phases):
        table.add_row(*row)
    Console(width=110).print(table)
    print(*figure_lines(o.figures), f"report: {o.output}", sep="\n")


if __name__ == "__main__":
    run_command(main)
