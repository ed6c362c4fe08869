"""The layouts of a plan as a picture: the memory of each by what it is for, beside the tokens of a day."""

from pathlib import Path

from megatron_ext.planning.assumptions import Assumptions
from megatron_ext.planning.search import Search

_GIB = 2**30


def draw(found: Search, assumed: Assumptions, path: str) -> None:
    """Draw the chosen layouts into a file at `path`, of the kind that its ending says."""
    from matplotlib.figure import Figure  # seconds to import, seldom needed

    figure = Figure(figsize=(10, 1.2 + 0.6 * max(len(found.chosen), 1)), layout="constrained")
    memory, speed = figure.subplots(1, 2, sharey=True)
    places, names = list(range(len(found.chosen))), list[str]()
    left = [0.0] * len(places)
    parts = ("state", "kept", "working", "buffers")
    labels = ("weights, gradients, optimizer", "activations", "worked with", "buffers")
    for part, label in zip(parts, labels, strict=True):
        sizes = [getattr(choice.memory, part) / _GIB for choice in found.chosen]
        memory.barh(places, sizes, left=left, label=label)
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    rest = [assumed.needed(c.memory.total) / _GIB - at for c, at in zip(found.chosen, left, strict=True)]
    memory.barh(places, rest, left=left, label="reserved, fragmentation", color="lightgrey")
    memory.axvline(assumed.memory_gib, color="black", linestyle="--", linewidth=1)
    memory.set_xlabel(f"GiB on the fullest rank (dashed: a GPU's {assumed.memory_gib:g})")
    memory.legend(fontsize="x-small", loc="lower left")
    for choice in found.chosen:
        at = choice.candidate.layout
        experts = f" EP{at.ep} ETP{at.etp}" if choice.candidate.run.model.is_moe else ""
        names.append(f"TP{at.tp} CP{at.cp} PP{at.pp}{experts} DP{at.dp}")
    rates = [c.candidate.time.tokens / c.candidate.time.seconds * 86400 / 1e9 for c in found.chosen]
    speed.barh(places, rates, color="tab:green")
    speed.set_xlabel("billion tokens a day, predicted")
    memory.set_yticks(places, names)
    memory.invert_yaxis()
    if not Path(path).suffix:
        path = f"{path}.png"
    figure.savefig(path, dpi=150)
