"""Imported once by the server that the pool's workers are forked from."""

import gc

import torch

import megatron_ext.training.session  # noqa: F401 - brings in megatron-core and everything a worker needs

# The server must stay single-threaded: a forked child gets none of its parent's threads.
torch.set_num_threads(1)

# What is imported stays: a worker that looks for garbage after each call need not go through it.
gc.freeze()
