"""One self-contained HTML page about training runs: curves, expert load, figures, configuration and generated text."""

from megatron_ext.monitoring.report.figures import figure_lines, read_figures
from megatron_ext.monitoring.report.page import write_report
from megatron_ext.monitoring.report.phases import SUMMARY_HEADER, Phase, read_phases, summary_rows

__all__ = ["SUMMARY_HEADER", "Phase", "figure_lines", "read_figures", "read_phases", "summary_rows", "write_report"]
