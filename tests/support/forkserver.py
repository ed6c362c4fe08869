"""The server that test processes are forked from: torch, megatron-core and transformers are imported in it once."""

import multiprocessing
import multiprocessing.forkserver
import os
from multiprocessing.context import ForkServerContext
from unittest import mock

PRELOAD = ["megatron_ext.testing.preload", "tests.support.preload"]
_ENVIRONMENT = dict(os.environ)
"""As it was before any test: what is forked has that of the server, which is started within some test or other."""


def context() -> ForkServerContext:
    """Where to start processes that have imported everything already."""
    multiprocessing.forkserver.set_forkserver_preload(PRELOAD)
    with mock.patch.dict(os.environ, _ENVIRONMENT, clear=True):
        multiprocessing.forkserver.ensure_running()
    return multiprocessing.get_context("forkserver")
