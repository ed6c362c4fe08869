"""Logging for many processes: rank 0 speaks, the others only when something is wrong; foreign chatter is kept out."""

import logging

_CHATTY = ("megatron.core", "torch.distributed", "filelock", "httpx", "urllib3")


def setup_logging(rank: int) -> None:
    """Send log records to stderr; ranks above 0 only from WARNING on, with their number in front."""
    who = "" if rank == 0 else f"[rank {rank}] "
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format=f"%(asctime)s {who}%(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
