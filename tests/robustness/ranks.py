"""Processes that stand for the ranks of a job, beside the store that their launcher would keep."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.support import forkserver

RANKS = 3


@contextmanager
def started(target: Callable[..., None], errors: Path, *arguments: Any) -> Iterator[tuple[list[Any], int]]:
    """A process for each rank, which has ended at last, and the port of the store.

    Args:
        target: called with the rank, the port, `errors` and `arguments`.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = forkserver.context()
    ranks = [context.Process(target=target, args=(rank, store.port, errors, *arguments)) for rank in range(RANKS)]
    try:
        for process in ranks:
            process.start()
        yield ranks, store.port
    finally:
        for process in ranks:
            process.kill()
            process.join()
