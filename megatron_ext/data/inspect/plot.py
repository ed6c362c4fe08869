"""Plots of prepared data, as image files."""

import io
from pathlib import Path
from typing import Any

from megatron_ext.errors import ConfigError
from megatron_ext.files import write_bytes

_KINDS = (".png", ".svg", ".pdf")


def check_plot(path: str | None) -> None:
    """Raise ConfigError where no image can be written under this name, before the work is done."""
    if path is not None and Path(path).suffix.lower() not in _KINDS:
        raise ConfigError(f"plot = {path}: the name must end with one of {', '.join(_KINDS)}")


def new_axes(x: str, y: str) -> Any:
    """Axes of a new plot that is never shown on a screen, with the names of both."""
    from matplotlib.figure import Figure  # seconds to import, seldom needed

    axes = Figure(figsize=(9, 5), layout="constrained").subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return axes


def save(axes: Any, path: str) -> None:
    """Write the plot of `axes`, with a legend, to `path`, which `check_plot` has seen."""
    axes.figure.legend(fontsize=8, loc="outside upper center", ncols=3)
    image = io.BytesIO()
    axes.figure.savefig(image, format=Path(path).suffix.lower()[1:], dpi=120)
    write_bytes(path, image.getvalue())
