"""The console: one line a step, in aligned columns on a terminal, in `key value` pairs that grep finds elsewhere."""

import logging
import shutil
import sys
from dataclasses import dataclass

from megatron_ext.monitoring.events import STARTED, Event
from megatron_ext.monitoring.sources import ValidationReport, pairs_line, step_line, validation_line
from megatron_ext.monitoring.step_report import StepRecord
from megatron_ext.planning.amounts import duration, flops, short_number

log = logging.getLogger(__name__)

_CLOCK = len("12:34:56 ")
"""What logging puts in front of a line."""


@dataclass(frozen=True)
class _Cell:
    """A figure of a line."""

    text: str
    """With its name."""
    worth: int = 0
    """Where the terminal is too narrow for all, those of less worth are left out."""


class ConsoleSink:
    """Says everything through logging.

    Args:
        shows_steps: whether steps and validations are said, not only events.
        is_terminal: whether somebody looks at it. Default: whether stderr is a terminal.
    """

    def __init__(self, *, shows_steps: bool = True, is_terminal: bool | None = None) -> None:
        self._shows_steps = shows_steps
        self._is_terminal = sys.stderr.isatty() if is_terminal is None else is_terminal
        self._widths: dict[int, int] = {}
        """Of each column, the widest that was shown."""

    def step(self, record: StepRecord) -> None:
        """One line."""
        if self._shows_steps:
            cells = _cells(record, with_progress=self._is_terminal)
            log.info("%s", self._aligned(cells) if self._is_terminal else " | ".join(c.text for c in cells if c.text))

    def validation(self, iteration: int, report: ValidationReport) -> None:
        """One line."""
        if self._shows_steps:
            log.info("step %d | %s", iteration, validation_line(report))

    def event(self, event: Event) -> None:
        """One line, as loud as it is serious; that the run has started its banner says."""
        if event.kind != STARTED:
            level = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}[event.severity]
            log.log(level, "step %d: %s", event.iteration, event.text)

    def flush(self) -> None:
        """Nothing waits."""

    def close(self, *, failed: bool) -> None:
        """Nothing is left to say."""

    def _aligned(self, cells: list[_Cell]) -> str:
        """The cells in columns as wide as they have been so far, as many as the terminal has room for."""
        room = shutil.get_terminal_size().columns - _CLOCK - 1
        kept = {number: cell for number, cell in enumerate(cells) if cell.text}
        for number, cell in kept.items():
            self._widths[number] = max(self._widths.get(number, 0), len(cell.text))
        while sum(self._widths[number] + 3 for number in kept) - 3 > room and len(kept) > 1:
            del kept[min(kept, key=lambda number: (kept[number].worth, -number))]
        return " | ".join(cell.text.ljust(self._widths[number]) for number, cell in kept.items()).rstrip()


def _cells(record: StepRecord, *, with_progress: bool) -> list[_Cell]:
    report, values = record.report, record.values
    memory, rate = report.memory_bytes, values["tokens_per_second"]
    experts = report.experts or {}
    dead = sum(health.dead_experts for health in experts.values())
    done = f"{report.iteration:>{len(str(record.last))}}" if with_progress else f"{report.iteration}"
    progress = f" {100 * report.iteration / max(record.last, 1):3.0f}%" if with_progress else ""
    left = record.seconds_left
    return [
        _Cell(f"step {done}/{record.last}{progress}", 9),
        _Cell(f"stage {report.stage}" if report.stage is not None else "", 3),
        _Cell(f"loss {report.losses['loss']:.4f}", 9),
        _Cell(pairs_line(report.losses), 8),
        _Cell(step_line(report.sources, report.steps), 1),
        _Cell(f"lr {report.learning_rate:.2e}", 5),
        _Cell(f"norm {report.grad_norm:.3f}", 6),
        _Cell(f"tokens {short_number(values['consumed_tokens'])} of {short_number(values['planned_tokens'])}", 4),
        _Cell(f"tok/s {rate:,.0f}" if rate >= 10 else f"tok/s {rate:.3g}", 7),
        _Cell(f"compute {flops(values['tflops_per_device'] * 1e12)}/s/device", 4),
        _Cell(f"mfu {100 * values['mfu']:.1f}%" if "mfu" in values else "", 5),
        _Cell(f"memory {memory / 2**30:,.1f} GiB" if memory >= 2**30 else f"memory {memory / 2**20:,.0f} MiB", 2),
        _Cell(f"MaxVio {max(health.max_violation for health in experts.values()):.2f}" if experts else "", 2),
        _Cell(f"dead experts {dead}" if dead else "", 3),
        _Cell(f"left {duration(left)}" if left is not None else "", 8),
    ]
