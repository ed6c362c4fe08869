"""What the runs of `upcycling.py` came to: losses, and how far their experts have specialised."""

import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ext.canonical.counts import ParameterCounts, count_parameters
from megatron_ext.model_io.network import megatron_network
from megatron_ext.model_io.open import Checkpoint, open_checkpoint
from megatron_ext.model_io.text import comparison_batches
from megatron_ext.monitoring.metrics_file import read_metrics

COLUMNS = (
    "way",
    "M parameters / active",
    "validation loss",
    "to dense",
    "entropy / ln E",
    "Max1/Max2",
    "cosine",
    "languages",
)
"""Of the table. The last four: in the last twentieth of the run the router's mean entropy and the ratio of the best two
probabilities; at its end the mean cosine between two experts of a layer and distance between two corpora's loads."""

Curve = list[tuple[int, float]]
"""(tokens, value) over a run."""


@dataclass(frozen=True)
class Figures:
    """What one run came to; the last four are empty in a dense model."""

    parameters: ParameterCounts
    validation: Curve
    entropy: Curve = field(default_factory=list)
    """Of a token's distribution over the experts, / ln E; mean over layers."""
    max1_max2: Curve = field(default_factory=list)
    """Ratio of a token's largest probability to its second largest; mean over layers."""
    cosine: float | None = None
    """Mean over layers and pairs of experts."""
    loads: Mapping[str, Tensor] = field(default_factory=dict)
    """[MoE layers, E] of each corpus: the share of assignments that each expert got."""

    @property
    def loss(self) -> float:
        """The last validation loss."""
        return self.validation[-1][1]

    @property
    def distance(self) -> float | None:
        """How differently corpora load experts, mean over layers and pairs: 0 alike, 1 no expert in common."""
        pairs = list(itertools.combinations(self.loads.values(), 2))
        return statistics.fmean(float((a - b).abs().sum(dim=1).mean() / 2) for a, b in pairs) if pairs else None


def figures_of(directory: Path, texts: Mapping[str, Path], *, sequences: int, length: int) -> Figures:
    """Read a run's metrics and look into its last checkpoint.

    Args:
        texts: a prepared dataset of each corpus to see which experts it is sent to.
        sequences: of a step.
        length: tokens of a sequence.
    """
    records, tokens = read_metrics(directory / "metrics.jsonl"), sequences * length
    validation = [(r["iteration"] * tokens, r["validation_loss"]) for r in records if "validation_loss" in r]
    opened = open_checkpoint(directory)
    parameters = count_parameters(opened.model)
    if not opened.model.is_moe:
        return Figures(parameters, validation)
    steps = [r for r in records if "moe" in r]
    window = max(len(steps) // 20, 1)

    def curve(key: str) -> Curve:
        values = [statistics.fmean(layer[key] for layer in r["moe"].values()) for r in steps]
        ends = range(window, len(values) + 1, window)
        return [(steps[end - 1]["iteration"] * tokens, statistics.fmean(values[end - window : end])) for end in ends]

    loads = corpus_loads(opened, texts, length)
    return Figures(parameters, validation, curve("entropy"), curve("max1_max2"), expert_cosine(opened), loads)


def expert_cosine(opened: Checkpoint) -> float:
    """Mean cosine between the weights of two experts of a layer."""
    values = []
    for layer, is_moe in enumerate(opened.model.moe_layer_pattern):
        if is_moe:
            prefix = f"decoder.layers.{layer}.mlp.experts"
            experts = torch.stack(
                [
                    torch.cat([opened.tensors.read(f"{prefix}.{e}.linear_fc{n}.weight").flatten() for n in (1, 2)])
                    for e in range(opened.model.num_moe_experts or 0)
                ]
            )
            unit = torch.nn.functional.normalize(experts.float(), dim=1)
            pairs = torch.triu_indices(len(unit), len(unit), offset=1)
            values.append(float((unit @ unit.t())[pairs[0], pairs[1]].mean()))
    return statistics.fmean(values)


@torch.no_grad()
def corpus_loads(opened: Checkpoint, texts: Mapping[str, Path], length: int) -> dict[str, Tensor]:
    """The share [MoE layers, E] of its assignments that each corpus gives to each expert, over 64 sequences."""
    loads = {}
    moe_layers = [layer for layer, is_moe in enumerate(opened.model.moe_layer_pattern) if is_moe]
    with megatron_network(opened.model, opened.tensors) as network:
        for name, text in texts.items():
            counts = torch.zeros(len(moe_layers), opened.model.num_moe_experts or 0)

            def count(row: int, module: Any, inputs: Any, outputs: Any, counts: Tensor = counts) -> None:
                counts[row] += outputs[1].sum(dim=0)

            hooks = [
                network.decoder.layers[layer].mlp.router.register_forward_hook(partial(count, row))
                for row, layer in enumerate(moe_layers)
            ]
            for batch in comparison_batches(opened.directory, text, None, batches=8, rows=8, length=length):
                network(batch, torch.arange(batch.shape[1]).expand_as(batch), None)
            for hook in hooks:
                hook.remove()
            loads[name] = counts / counts.sum(dim=1, keepdim=True)
    return loads


def rows(results: Mapping[str, Sequence[Figures]], reference: str) -> Iterator[list[str]]:
    """A row of the table for each way, with the difference to the way `reference` of the same seed."""
    for name, figures in results.items():
        counts = figures[0].parameters
        differences = [own.loss - other.loss for own, other in zip(figures, results[reference], strict=True)]
        yield [
            name,
            f"{counts.total / 1e6:.1f} / {counts.active / 1e6:.1f}",
            _spread([f.loss for f in figures]),
            "" if name == reference else _spread(differences, sign="+"),
            _spread([f.entropy[-1][1] for f in figures if f.entropy], 3),
            _spread([f.max1_max2[-1][1] for f in figures if f.max1_max2], 2),
            _spread([f.cosine for f in figures if f.cosine is not None], 3),
            _spread([f.distance for f in figures if f.distance is not None], 3),
        ]


def _spread(values: Sequence[float], digits: int = 4, sign: str = "") -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}.{digits}f}{spread}"


def plot(results: Mapping[str, Sequence[Figures]], before: float, path: Path) -> None:
    """Curves of every way, the mean of its seeds with their range; below, the loads of experts by corpus.

    Args:
        before: the validation loss of the dense model that all ways start from.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    moes = {name: figures for name, figures in results.items() if figures[0].loads}
    figure = pyplot.figure(figsize=(15, 8), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(3, 2))
    panels = above.subplots(1, 3)
    titles = {"validation": "validation loss", "entropy": "router entropy / ln E", "max1_max2": "Max1/Max2"}
    for axes, (attribute, title) in zip(panels, titles.items(), strict=True):
        for number, (name, figures) in enumerate(results.items()):
            _draw_curves(axes, name, [getattr(f, attribute) for f in figures], f"C{number}")
        axes.set_xlabel("M tokens after the dense model")
        axes.set_title(title)
    panels[0].axhline(before, color="grey", linewidth=0.5, label="dense model before")
    panels[0].set_ylim(top=before + 0.5)
    panels[0].legend(fontsize=8)
    panels[2].set_yscale("log")
    below.suptitle("load of each expert (columns) by corpus, last layer, first seed; 1 is an even share")
    for axes, (name, figures) in zip(below.subplots(1, len(moes), squeeze=False)[0], moes.items(), strict=True):
        load_CE = torch.stack([load_LE[-1] for load_LE in figures[0].loads.values()])
        image = axes.imshow(load_CE * load_CE.shape[1], vmin=0, vmax=3, aspect="auto", cmap="magma")
        axes.set_yticks(range(len(load_CE)), list(figures[0].loads))
        axes.set_title(name, fontsize=9)
    below.colorbar(image, ax=below.axes)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def _draw_curves(axes: Any, name: str, curves: Sequence[Curve], color: str) -> None:
    if not curves[0]:
        return
    tokens = [count / 1e6 for count, _ in curves[0]]
    values = [[value for _, value in points] for points in zip(*curves, strict=True)]
    axes.plot(tokens, [statistics.fmean(seeds) for seeds in values], label=name, color=color)
    axes.fill_between(
        tokens, [min(seeds) for seeds in values], [max(seeds) for seeds in values], color=color, alpha=0.2
    )
