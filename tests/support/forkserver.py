"""The server that test processes are forked from: torch, megatron-core and transformers are imported in it once."""

import multiprocessing
import multiprocessing.forkserver
from multiprocessing.context import ForkServerContext

PRELOAD = ["megatron_ext.testing.preload", "tests.support.preload"]


def context() -> ForkServerContext:
    """Where to start processes that have imported everything already."""
    multiprocessing.forkserver.set_forkserver_preload(PRELOAD)
    multiprocessing.forkserver.ensure_running()
    return multiprocessing.get_context("forkserver")
