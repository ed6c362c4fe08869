"""Which experts serve which language: the share of a text's tokens that each expert of each layer is given."""

#   E experts, N texts

import io
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ext.data.tokenizer import load_tokenizer
from megatron_ext.errors import ConfigError
from megatron_ext.files import write_bytes
from megatron_ext.mcore.model import routers
from megatron_ext.model_io.network import megatron_network
from megatron_ext.model_io.open import open_checkpoint


@dataclass(frozen=True)
class Routing:
    """Of one model."""

    shares: dict[int, dict[str, list[float]]]
    """By layer, counted from 1, and by text: the share of assignments of each expert, [E]; together 1."""

    def apart(self, layer: int) -> float:
        """How far the texts go to different experts, from 0, alike, to 1, each to experts of its own.

        The mutual information of text and expert, all texts counting alike, over the most that it can be.
        """
        rows = list(self.shares[layer].values())
        if len(rows) < 2:
            return 0.0
        mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        bits = sum(p * math.log2(p / m) for row in rows for p, m in zip(row, mean, strict=True) if p > 0)
        return bits / len(rows) / math.log2(min(len(rows), len(mean)))

    def favourites(self, layer: int, text: str, count: int = 3) -> list[tuple[int, float]]:
        """The experts that a text is sent to most, with their shares."""
        row = self.shares[layer][text]
        return sorted(enumerate(row), key=lambda one: (-one[1], one[0]))[:count]


def routing_by_text(directory: str | Path, texts: Mapping[str, Iterable[str]], window: int) -> Routing:
    """Send texts through the Hugging Face model in `directory`, by megatron-core's own forward pass, on the CPU.

    Args:
        texts: documents by the name of their text; longer ones are cut into pieces of `window` tokens.

    Raises:
        ConfigError: the model has no experts.
    """
    opened = open_checkpoint(directory)
    if not opened.model.is_moe:
        raise ConfigError(f"{directory}: has no experts to be routed to")
    if opened.model.position_embedding_type == "learned_absolute":
        window = min(window, opened.model.max_position_embeddings)
    tokenizer = load_tokenizer(directory)
    counts: dict[int, dict[str, Tensor]] = {}
    with megatron_network(opened.model, opened.tensors) as network, torch.no_grad():
        for name, documents in texts.items():
            handles = []
            for router in routers([network]):
                assert router.layer_number is not None
                of_layer = counts.setdefault(router.layer_number, {})
                handles.append(router.register_forward_hook(_counting(of_layer, name)))
            for tokens in _pieces(tokenizer, documents, window):
                network(tokens, torch.arange(tokens.shape[1])[None], None)
            for handle in handles:
                handle.remove()
    return Routing({layer: {n: (c / c.sum()).tolist() for n, c in by.items()} for layer, by in sorted(counts.items())})


def _counting(counts: dict[str, Tensor], name: str) -> Any:
    def count(module: Any, arguments: Any, output: tuple[Tensor, Tensor]) -> None:
        chosen_E = output[1].reshape(-1, output[1].shape[-1]).sum(0).double()
        counts[name] = counts[name] + chosen_E if name in counts else chosen_E

    return count


def _pieces(tokenizer: Any, documents: Iterable[str], window: int) -> Iterator[Tensor]:
    for document in documents:
        ids = tokenizer(document)["input_ids"]
        for at in range(0, len(ids), window):
            yield torch.tensor([ids[at : at + window]])


def plot_routing(routing: Routing, path: str) -> None:
    """Write a heat map for each text to `path`: layers by experts, 1 being an even share."""
    from matplotlib.figure import Figure  # seconds to import, seldom needed
    from matplotlib.ticker import MaxNLocator

    layers, names = list(routing.shares), list(next(iter(routing.shares.values())))
    columns = min(len(names), 3)
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(5 * columns, 1.5 + 3 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    experts = max(len(row) for by in routing.shares.values() for row in by.values())
    image: Any = None
    for number, name in enumerate(names):
        panel = axes[number // columns][number % columns]
        loads = [
            [share * len(routing.shares[layer][name]) for share in routing.shares[layer][name]] for layer in layers
        ]
        whole = [load + [math.nan] * (experts - len(load)) for load in loads]
        image = panel.imshow(whole, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2, interpolation="nearest")
        panel.set_title(name)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    for unused in list(axes.flat)[len(names) :]:
        unused.set_visible(False)
    figure.supxlabel("expert")
    figure.supylabel("layer")
    figure.colorbar(image, ax=axes, label="load: 1 is even, darkest 2 and more")
    content = io.BytesIO()
    figure.savefig(content, format=Path(path).suffix.lower()[1:], dpi=120)
    write_bytes(path, content.getvalue())
