"""What tools/upcycle.py and tools/verify.py measured, with a verdict where there is one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_ext.errors import DataError
from megatron_ext.files import read_json_object


def read_figures(path: str | Path) -> dict[str, dict[str, Any]]:
    """The comparisons that tools/upcycle.py or tools/verify.py wrote to `path`."""
    content = read_json_object(path, DataError)
    if not all(isinstance(figures, dict) for figures in content.values()):
        raise DataError(f"{path}: not written by --figures of tools/upcycle.py or tools/verify.py")
    return content


def figure_lines(files: Sequence[str | Path]) -> list[str]:
    """One line a comparison, for the terminal."""
    lines = []
    for path in files:
        for name, figures in read_figures(path).items():
            shown = ", ".join(f"{key.replace('_', ' ')} {number(value)}" for key, value in figures.items())
            lines.append(f"{name}: {shown}")
    return lines


def number(value: Any) -> str:
    """A figure as text: three digits of a fraction, whole numbers in full, the first entries of a list."""
    if isinstance(value, list):
        return "none" if not value else ", ".join(map(str, value[:5]))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:.3g}" if isinstance(value, float) else f"{value:,}"
