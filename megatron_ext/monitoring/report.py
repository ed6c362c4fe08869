"""One self-contained HTML page about a finished piece of work: curves, expert load, figures and generated text."""

import base64
import html
import importlib.resources
import io
import json
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.errors import DataError
from megatron_ext.files import read_json_object, write_text
from megatron_ext.monitoring.metrics_file import read_metrics


@dataclass(frozen=True)
class Phase:
    """One training run of the report, by its metrics file."""

    name: str
    records: list[dict[str, Any]]

    @property
    def steps(self) -> list[dict[str, Any]]:
        """Reports of training steps."""
        return [record for record in self.records if "loss" in record]

    @property
    def validations(self) -> list[dict[str, Any]]:
        """Reports of validations."""
        return [record for record in self.records if "validation_loss" in record]

    @property
    def tokens(self) -> int:
        """Tokens consumed by the whole phase."""
        return int(self.steps[-1]["consumed_tokens"]) if self.steps else 0


def read_phases(named_files: Sequence[str]) -> list[Phase]:
    """Phases from `name=metrics.jsonl` entries, in order.

    Raises:
        DataError: an entry is no such pair, or its file holds no training step.
    """
    phases = []
    for entry in named_files:
        name, equals, path = entry.partition("=")
        if not equals:
            raise DataError(f"metrics: {entry!r}: expected name=metrics.jsonl")
        phases.append(Phase(name, read_metrics(path)))
        if not phases[-1].steps:
            raise DataError(f"{path}: holds no training step")
    return phases


def read_figures(path: str | Path) -> dict[str, dict[str, Any]]:
    """The comparisons that tools/upcycle.py or tools/verify.py wrote to `path`."""
    content = read_json_object(path, DataError)
    if not all(isinstance(figures, dict) for figures in content.values()):
        raise DataError(f"{path}: not written by --figures of tools/upcycle.py or tools/verify.py")
    return content


def write_report(
    output: str | Path, title: str, phases: Sequence[Phase], figures: Sequence[str | Path], generated: str | Path | None
) -> None:
    """Write the page to `output`.

    Args:
        figures: JSON files written by tools/upcycle.py and tools/verify.py.
        generated: JSON file written by tools/generate.py.
    """
    sections = [
        _section("Training", _summary_table(phases) + _image(_curves(phases), "loss, learning rate and throughput")),
        *(_experts_section(phase) for phase in phases if any(step.get("moe") for step in phase.steps)),
        *(_figures_section(Path(path)) for path in figures),
    ]
    if generated is not None:
        sections.append(_generated_section(Path(generated)))
    template = importlib.resources.files("megatron_ext.monitoring").joinpath("report.html").read_text(encoding="utf-8")
    page = string.Template(template).substitute(title=html.escape(title), sections="\n".join(sections))
    write_text(output, page)


def summary_rows(phases: Sequence[Phase]) -> list[tuple[str, ...]]:
    """One row a phase: name, steps, tokens, first and last loss, last validation loss, tokens/s, TFLOP/s a device."""
    rows = []
    for phase in phases:
        if not phase.steps:
            continue
        rates = sorted(step["tokens_per_second"] for step in phase.steps)
        tflops = sorted(step["tflops_per_device"] for step in phase.steps)
        validation = f"{phase.validations[-1]['validation_loss']:.3f}" if phase.validations else "-"
        rows.append(
            (
                phase.name,
                f"{phase.steps[-1]['iteration']}",
                f"{phase.tokens:,}",
                f"{phase.steps[0]['loss']:.3f}",
                f"{phase.steps[-1]['loss']:.3f}",
                validation,
                f"{rates[len(rates) // 2]:,.0f}",
                f"{tflops[len(tflops) // 2]:.3g}",
            )
        )
    return rows


SUMMARY_HEADER = ("phase", "steps", "tokens", "first loss", "last loss", "validation", "tokens/s", "TFLOP/s/device")


def figure_lines(files: Sequence[str | Path]) -> list[str]:
    """One line a comparison, for the terminal."""
    lines = []
    for path in files:
        for name, figures in read_figures(path).items():
            shown = ", ".join(f"{key.replace('_', ' ')} {_number(value)}" for key, value in figures.items())
            lines.append(f"{name}: {shown}")
    return lines


def _summary_table(phases: Sequence[Phase]) -> str:
    return _table(SUMMARY_HEADER, summary_rows(phases))


def _curves(phases: Sequence[Phase]) -> Any:
    """Loss of all phases on one axis of consumed tokens; below it learning rate, tokens/s and TFLOP/s."""
    plt = _pyplot()
    figure, axes = plt.subplots(4, 1, figsize=(9, 10), sharex=True, height_ratios=(3, 1, 1, 1))
    start = 0
    for color, phase in enumerate(phases):
        style = {"color": f"C{color}"}
        tokens = [(start + step["consumed_tokens"]) / 1e6 for step in phase.steps]
        axes[0].plot(tokens, [step["loss"] for step in phase.steps], label=phase.name, linewidth=1, **style)
        position = {step["iteration"]: x for step, x in zip(phase.steps, tokens, strict=True)}
        seen = [
            (position[v["iteration"]], v["validation_loss"]) for v in phase.validations if v["iteration"] in position
        ]
        if seen:
            axes[0].plot(*zip(*seen, strict=True), "o", label=f"{phase.name}, validation", markersize=4, **style)
        for axis, key in zip(axes[1:], ("learning_rate", "tokens_per_second", "tflops_per_device"), strict=True):
            axis.plot(tokens, [step[key] for step in phase.steps], linewidth=1, **style)
        start += phase.tokens
    for axis, label in zip(axes, ("loss (nats a token)", "learning rate", "tokens/s", "TFLOP/s a device"), strict=True):
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0].legend()
    axes[-1].set_xlabel("tokens (millions)")
    return figure


def _experts_section(phase: Phase) -> str:
    steps = [step for step in phase.steps if step.get("moe")]
    load = _image(_load_map(steps), "share of tokens each expert received")
    return _section(
        f"Experts, {phase.name}", load + _image(_health_curves(steps), "health of each MoE layer's routing")
    )


def _health_curves(steps: Sequence[dict[str, Any]]) -> Any:
    """One curve a MoE layer of what shows a router in trouble."""
    shown = {
        "max_violation": "MaxVio",
        "dead_experts": "dead experts",
        "entropy": "entropy / ln E",
        "top1": "top-1 probability",
        "max1_max2": "Max1 / Max2",
        "drop_rate": "drop rate",
    }
    plt = _pyplot()
    layers = sorted(steps[-1]["moe"], key=int)
    figure, axes = plt.subplots(3, 2, figsize=(9, 7), sharex=True)
    for axis, (name, label) in zip(axes.flat, shown.items(), strict=True):
        for number, layer in enumerate(layers):
            color = plt.get_cmap("viridis")(number / max(len(layers) - 1, 1))
            values = [step["moe"][layer][name] for step in steps]
            axis.plot([step["iteration"] for step in steps], values, color=color, linewidth=1, label=f"layer {layer}")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=7)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    return figure


def _load_map(steps: Sequence[dict[str, Any]]) -> Any:
    """For each MoE layer a heat map: steps across, experts down, the colour says how busy against an even share."""
    plt = _pyplot()
    layers = sorted(steps[-1]["moe"], key=int)
    figure, axes = plt.subplots(len(layers), 1, figsize=(9, 1.2 + 1.3 * len(layers)), sharex=True, squeeze=False)
    for axis, layer in zip(axes[:, 0], layers, strict=True):
        shares = [step["moe"][layer]["load"] for step in steps]
        experts = len(shares[0])
        relative = [[share[expert] * experts for share in shares] for expert in range(experts)]
        extent = (steps[0]["iteration"], steps[-1]["iteration"] + 1, experts - 0.5, -0.5)
        picture = axis.imshow(
            relative, aspect="auto", vmin=0, vmax=2, cmap="RdBu_r", extent=extent, interpolation="nearest"
        )
        axis.set_ylabel(f"layer {layer}\nexpert")
    axes[-1, 0].set_xlabel("step")
    figure.colorbar(picture, ax=axes[:, 0], label="load / even share")
    return figure


def _figures_section(path: Path) -> str:
    comparisons = read_figures(path)
    rows = [
        (name, key.replace("_", " "), _number(value))
        for name, figures in comparisons.items()
        for key, value in figures.items()
    ]
    return _section(f"Verification: {', '.join(comparisons)}", _table(("comparison", "figure", "value"), rows))


def _generated_section(path: Path) -> str:
    try:
        rows = [(row["prompt"], row["continuation"]) for row in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not written by --output of tools/generate.py") from error
    body = "".join(f"<pre><b>{html.escape(prompt)}</b>{html.escape(text)}</pre>" for prompt, text in rows)
    return _section("Generated by the exported model", body)


def _number(value: Any) -> str:
    if isinstance(value, list):
        return "none" if not value else ", ".join(map(str, value[:5]))
    return f"{value:.3g}" if isinstance(value, float) else f"{value:,}"


def _section(title: str, body: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>\n{body}</section>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>"


def _image(figure: Any, description: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    _pyplot().close(figure)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(description)}" src="data:image/png;base64,{data}">'


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")  # pictures are written, never shown
    import matplotlib.pyplot as plt

    return plt
