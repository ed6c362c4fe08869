"""Logging for many processes: rank 0 speaks, the others only when something is wrong, and foreign chatter is kept out."""

import logging
import os
import warnings

from rich.console import Console
from rich.logging import RichHandler

_CHATTY = ("megatron.core", "torch.distributed.run", "torch.distributed.elastic", "filelock", "httpx", "urllib3")


def quiet_imports() -> None:
    """Silence what megatron-core and torch warn about at import: choices this framework makes on purpose."""
    warnings.filterwarnings("ignore", module=r"megatron\.core.*")
    warnings.filterwarnings("ignore", module=r"torch\..*")


def setup_logging(rank: int) -> None:
    """Send log records to stderr; ranks above 0 only from WARNING on, with their number in front."""
    quiet_imports()
    console = Console(stderr=True, width=None if os.isatty(2) else 160, soft_wrap=True)
    handler = RichHandler(console=console, show_path=False, show_time=True, log_time_format="%H:%M:%S", markup=False)
    handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, handlers=[handler], force=True)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
