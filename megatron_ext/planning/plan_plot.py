"""The layouts of a plan as a picture: the memory of each by what it is for, beside the tokens of a day."""

import io
from pathlib import Path

from megatron_ext.errors import ConfigError
from megatron_ext.files import write_bytes
from megatron_ext.planning.assumptions import Assumptions
from megatron_ext.planning.search import Search

_GIB = 2**30


def draw(found: Search, assumed: Assumptions, path: str) -> None:
    """Draw the chosen layouts into a file at `path`, of the kind that its ending says.

    Raises:
        ConfigError: none was chosen.
    """
    if not found.chosen:
        raise ConfigError(f"--plot {path}: no layout fits, so there is none to draw; see above what it takes")
    from matplotlib.figure import Figure  # seconds to import, seldom needed

    figure = Figure(figsize=(10, 1.5 + 0.6 * len(found.chosen)), layout="constrained")
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
    figure.legend(fontsize="small", loc="outside upper center", ncols=5)
    for choice in found.chosen:
        at = choice.candidate.layout
        experts = f" EP{at.ep} ETP{at.etp}" if choice.candidate.run.model.is_moe else ""
        names.append(f"TP{at.tp} CP{at.cp} PP{at.pp}{experts} DP{at.dp}")
    rates = [choice.rate * 86400 / 1e9 for choice in found.chosen]
    speed.barh(places, rates, color="tab:green")
    speed.set_xlabel("billion tokens a day, predicted")
    memory.set_yticks(places, names)
    memory.invert_yaxis()
    content = io.BytesIO()
    figure.savefig(content, format=Path(path).suffix.lower()[1:], dpi=150)
    write_bytes(path, content.getvalue())
