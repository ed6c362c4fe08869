"""Progress bars for long work, on a terminal; a line at the end elsewhere."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def byte_progress(what: str) -> Iterator[Callable[..., None]]:
    """Yield a function that is told (bytes done, bytes in all) and shows a bar with MB/s and the time left.

    It may be told a third thing, what else there is to say so far, which stands behind the bar.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    begun, ended, total_bytes = time.perf_counter(), 0.0, 0
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None, note="")

        def advance(done: int, total: int, note: str = "") -> None:
            nonlocal total_bytes, ended
            total_bytes, ended = total, time.perf_counter()
            bar.update(task, completed=done, total=total, note=note)

        yield advance
    if not console.is_terminal and total_bytes:
        seconds = max(ended - begun, 1e-3)
        rate = amount_of_bytes(total_bytes / seconds)
        print(f"{what}: {amount_of_bytes(total_bytes)} in {seconds:.3g} s ({rate}/s)", file=sys.stderr)


def counted(items: Iterable[T], what: str) -> Iterator[T]:
    """Yield `items`, of which nobody knows how many there are, showing on a terminal how many have come."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.completed:,.0f} {task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(what, total=None)
        for number, item in enumerate(items, start=1):
            yield item
            if number % 100 == 0:
                bar.update(task, completed=number)


def amount_of_bytes(count: float) -> str:
    """An amount of bytes in three digits: `1.23 MB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB" if count < 999.5 else f"{count:,.0f} TB"
