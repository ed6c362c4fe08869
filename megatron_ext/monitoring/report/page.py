"""The page itself: tables, plots that can be zoomed, everything it needs inside."""

import html
import importlib.resources
import json
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_ext.config.yaml_text import dump_yaml
from megatron_ext.errors import DataError
from megatron_ext.files import write_text
from megatron_ext.foreign import reading
from megatron_ext.monitoring.report.evaluations import evaluation_table, evaluations, sample_table
from megatron_ext.monitoring.report.figures import number, read_figures
from megatron_ext.monitoring.report.phases import SUMMARY_HEADER, Phase, summary_rows
from megatron_ext.monitoring.report.plots import plot_data, silent
from megatron_ext.monitoring.report.sources import SOURCES_HEADER, has_sources, source_rows

_MOST_EVENTS = 200
"""Lines of a table of events."""


def write_report(
    output: str | Path, title: str, phases: Sequence[Phase], figures: Sequence[str | Path], generated: str | Path | None
) -> None:
    """Write the page to `output`.

    Args:
        figures: JSON files written by tools/upcycle.py and tools/verify.py.
        generated: JSON file written by tools/generate.py.
    """
    page = report_page(title, phases, figures, generated)
    write_text(output, page.encode(errors="replace").decode())  # JSON may hold half a character


def report_page(
    title: str,
    phases: Sequence[Phase],
    figures: Sequence[str | Path] = (),
    generated: str | Path | None = None,
    *,
    live: int | None = None,
) -> str:
    """The page; with `live`, the number of what it shows, it asks whoever sent it for what is new."""
    sections = [
        _section("Training", _summary_table(phases) + '<div id="curves"></div>'),
        *([_section("Sources, all runs", '<div id="compared"></div>')] if _compares_sources(phases) else []),
        *(_sources_section(index, phase) for index, phase in enumerate(phases) if has_sources(phase)),
        *(_experts_section(index, phase) for index, phase in enumerate(phases) if phase.routed),
        *(_times_section(index, phase) for index, phase in enumerate(phases) if _has_times(phase)),
        *(_section(f"Events, {phase.name}", _events_table(index, phase)) for index, phase in enumerate(phases)),
        *(_evaluation_section(index, phase) for index, phase in enumerate(phases) if evaluations(phase)),
        *(_figures_section(Path(path)) for path in figures),
    ]
    if generated is not None:
        sections.append(_generated_section(Path(generated)))
    sections.append(_section("Runs", "".join(_run_details(phase) for phase in phases)))
    return string.Template(_resource("page.html")).substitute(
        title=html.escape(title),
        live="" if live is None else str(live),
        sections="\n".join(sections),
        library=_resource("vendor/uPlot.iife.min.js"),
        library_style=_resource("vendor/uPlot.min.css"),
        style=_resource("page.css"),
        script=_resource("plots.js") + _resource("draw.js"),
        # Within a script element only "<" could end it.
        data=json.dumps(plot_data(phases) | {"sections": section_names(phases)}, allow_nan=False).replace(
            "<", "\\u003c"
        ),
    )


def tables(phases: Sequence[Phase]) -> dict[str, str]:
    """What changes while the runs go on, beside the plots: HTML by its id."""
    events = {f"events-{index}": _events_table(index, phase) for index, phase in enumerate(phases)}
    found = {
        f"evaluation-{index}": _evaluation_tables(index, phase)
        for index, phase in enumerate(phases)
        if evaluations(phase)
    }
    return {"summary": _summary_table(phases), **events, **found}


def _summary_table(phases: Sequence[Phase]) -> str:
    return f'<div id="summary">{_table(SUMMARY_HEADER, summary_rows(phases))}</div>'


def section_names(phases: Sequence[Phase]) -> list[str]:
    """What the page has sections of; with others it is another page."""
    kinds: dict[str, Callable[[Phase], bool]] = {
        "sources": has_sources,
        "experts": lambda phase: bool(phase.routed),
        "times": _has_times,
        "evaluation": lambda phase: bool(evaluations(phase)),
    }
    return [f"{kind} {phase.name}" for phase in phases for kind, has in kinds.items() if has(phase)] + [
        f"{phase.name} {len(phase.starts)}" for phase in phases
    ]


def _resource(name: str) -> str:
    files = importlib.resources.files("megatron_ext.monitoring.report")
    return files.joinpath(name).read_text(encoding="utf-8")


def _has_times(phase: Phase) -> bool:
    return any(step["step_seconds"] for step in phase.steps)


def _compares_sources(phases: Sequence[Phase]) -> bool:
    return sum(map(has_sources, phases)) > 1


def _times_section(index: int, phase: Phase) -> str:
    return _section(f"Time of a step, {phase.name}", f'<div class="times" data-phase="{index}"></div>')


def _events_table(index: int, phase: Phase) -> str:
    shown = phase.events[-_MOST_EVENTS:]
    rows = [(f"{event['iteration']:,}", event["event"].replace("_", " "), event["text"]) for event in shown]
    note = f"<p>The last {len(shown)} of {len(phase.events):,}.</p>" if len(shown) < len(phase.events) else ""
    body = note + _table(("step", "event", "what happened"), rows) if rows else "<p>Nothing but steps.</p>"
    return f'<div id="events-{index}">{body}</div>'


def _evaluation_section(index: int, phase: Phase) -> str:
    plots = f'<div class="evaluated" data-phase="{index}"></div>'
    return _section(f"Evaluation, {phase.name}", _evaluation_tables(index, phase) + plots)


def _evaluation_tables(index: int, phase: Phase) -> str:
    found = _table(*evaluation_table(phase))
    header, rows = sample_table(phase)
    samples = f"<h3>What the newest checkpoints write</h3>{_table(header, rows)}" if rows else ""
    return f'<div id="evaluation-{index}">{found}{samples}</div>'


def _experts_section(index: int, phase: Phase) -> str:
    zero = silent(phase)
    note = f"<p>Zero in every layer at every step: {html.escape('; '.join(zero))}.</p>" if zero else ""
    return _section(f"Experts, {phase.name}", f'{note}<div class="experts" data-phase="{index}"></div>')


def _sources_section(index: int, phase: Phase) -> str:
    plots = f'<div class="sources" data-phase="{index}"></div>'
    stages = ", ".join(dict.fromkeys(step["stage"] for step in phase.steps if isinstance(step.get("stage"), str)))
    note = f"<p>Stages: {html.escape(stages)}. A dashed line: the next one.</p>" if stages else ""
    return _section(f"Sources, {phase.name}", _table(SOURCES_HEADER, source_rows(phase)) + note + plots)


def _figures_section(path: Path) -> str:
    comparisons = read_figures(path)
    rows = [
        (name, key.replace("_", " "), number(value))
        for name, figures in comparisons.items()
        for key, value in figures.items()
    ]
    return _section(f"Verification: {', '.join(comparisons)}", _table(("comparison", "figure", "value"), rows))


def _generated_section(path: Path) -> str:
    with reading(path, DataError, advice="not written by --output of tools/generate.py"):
        rows = [(row["prompt"], row["continuation"]) for row in json.loads(path.read_text(encoding="utf-8"))]
        body = "".join(f"<pre><b>{html.escape(prompt)}</b>{html.escape(text)}</pre>" for prompt, text in rows)
    return _section("Generated by the exported model", body)


def _run_details(phase: Phase) -> str:
    """When the run was started and continued, where, in which layout and versions; its configuration."""
    rows = [
        (f"step {start.get('iteration', 0)}", _described(start, "layout"), _described(start, "versions"))
        for start in phase.starts
    ]
    table = _table(("started at", "layout", "on"), rows) if rows else "<p>No start was recorded.</p>"
    run: dict[str, Any] | None = phase.starts[-1].get("run") if phase.starts else None
    configuration = (
        f"<details><summary>configuration</summary><pre>{html.escape(dump_yaml(run))}</pre></details>" if run else ""
    )
    return f"<h3>{html.escape(phase.name)}</h3>{table}{configuration}"


def _described(start: dict[str, Any], key: str) -> str:
    described = start.get(key)
    if isinstance(described, dict):
        return ", ".join(f"{name} {value}" for name, value in described.items())
    return f"{start['world_size']} processes" if key == "layout" and "world_size" in start else "-"


def _section(title: str, body: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>\n{body}</section>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'
