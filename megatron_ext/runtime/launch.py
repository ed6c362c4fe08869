"""torchrun for training: starts the ranks of a node, hands signals on to them, and says in one message how they ended.

  python -m megatron_ext.runtime.launch [torchrun's options] tools/train.py RUN.yaml ...

torchrun itself ends with two tracebacks and a table under the message of the rank that met the fault.
"""

import argparse
import logging
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing import ProcessFailure, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousError
from torch.distributed.run import parse_args, run

from megatron_ext.launcher import JOB_START, STOP_FILE, failure_file, name_launcher
from megatron_ext.roll_call import tell_of_end

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)
"""Handed on to the ranks. Some Slurm scripts warn with SIGUSR1: torchrun would die of it and leave its ranks."""
_WHAT_NOW = ". The other ranks were ended; started again, the run goes on from its newest checkpoint"
_SECONDS_TO_SAVE = 900
"""From such a signal to SIGKILL: the ranks finish their step and write a checkpoint."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run torchrun with `arguments` and end with the exit code of the rank that ended first."""
    logging.disable(logging.CRITICAL)  # torchrun's account of what it does; its faults are errors
    options = parse_args(arguments)
    handled = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores SIGHUP
    options.signals_to_handle = ",".join(number.name for number in handled)
    options.shutdown_timeout = _SECONDS_TO_SAVE
    os.environ[JOB_START] = str(time.time())
    name_launcher()
    if options.max_restarts or ":" in options.nnodes:
        # torch keeps one store for all rounds, in which ranks that start again find the addresses of those before them,
        # and wait for them for ever. So each round gets a store of its own.
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    with tempfile.TemporaryDirectory(prefix="megatron-ext-launch-") as directory:
        stop_file = Path(directory) / "stopped"
        os.environ[STOP_FILE] = str(stop_file)
        _run(options)
        sys.exit(int(stop_file.read_text()) if stop_file.exists() else 0)


def _run(options: argparse.Namespace) -> None:
    """Run torchrun; end this process where that ends other than well."""
    try:
        run(options)
    except ChildFailedError as error:
        rank, failure = first_to_fail(error.failures)
        is_said = any(other.exitcode == 2 for other in error.failures.values())
        if how := how_it_ended(failure):
            message = f"rank {rank} (process {failure.pid} on {socket.gethostname()}) {how}"
            print(message if is_said else f"error: {message}{_WHAT_NOW}", file=sys.stderr)
            if options.rdzv_backend == "static" and not options.standalone:
                how = how_it_ended(failure, "in the lines of its node") or ""
                meeting = (options.master_addr, options.master_port)
                keeps_store = options.node_rank == 0 and options.nnodes != "1"
                tell_of_end(*meeting, options.rdzv_id, rank, how, keeps_store=keeps_store)
        sys.exit(failure.exitcode if failure.exitcode > 0 else 2)  # lost: ended by a signal that nobody sent to the job
    except SignalException as error:
        # The ranks have ended too: as they were told, with the run saved, or because they could not save it.
        sys.exit(2 if failure_file(os.environ[STOP_FILE]).exists() else 128 + error.sigval)
    except RendezvousClosedError:
        print(
            "error: another node has ended and does not start again (MAX_RESTARTS), which ends the run on every node; "
            "why, stands above or in the lines of that node",
            file=sys.stderr,
        )
        sys.exit(2)
    except (DistError, RendezvousError) as error:
        place = options.rdzv_endpoint or f"{options.master_addr}:{options.master_port}"
        first_line = str(error).strip().partition("\n")[0]
        print(
            f"error: the nodes did not meet at {place}, or lost that node: {first_line}; every node starts the same "
            "command with the same MASTER_ADDR, MASTER_PORT and NNODES, a NODE_RANK of its own, and reaches that port",
            file=sys.stderr,
        )
        sys.exit(2)


def first_to_fail(failures: Mapping[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """The rank that ended the others, of all that are found ended at once.

    One that was killed comes before those that lost their connection to it, and last the ones that the launcher ended.
    """

    def order(item: tuple[int, ProcessFailure]) -> tuple[int, int, int]:
        rank, failure = item
        code = failure.exitcode
        kinds = (0 > code != -signal.SIGTERM, code == 2, 0 < code < 128, code >= 128, True)
        return kinds.index(True), failure.timestamp, rank

    return min(failures.items(), key=order)


def how_it_ended(failure: ProcessFailure, reason: str = "above") -> str | None:
    """How a rank ended; None where it said so itself: bad input (2), or a signal that it was sent (128 and more).

    Args:
        reason: where it stands.
    """
    if failure.exitcode == 2 or failure.exitcode >= 128:
        return None
    if failure.exitcode > 0:
        return f"ended with exit code {failure.exitcode}; why, stands {reason}"
    name = signal.Signals(-failure.exitcode).name
    cause = ": often memory ran out, see dmesg or the job's accounting" if name == "SIGKILL" else ""
    return f"was killed by {name}{cause}"


if __name__ == "__main__":
    main()
