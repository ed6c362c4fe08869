"""The way of the samples' seeds from the model's arguments to its routers, also when a layer is computed again.

No argument of megatron-core's layers could carry them: a router is called with hidden states alone, and recompute
calls layers again after the model has gone on to other micro-batches. What recompute does restore are the states of
megatron-core's tracker of random numbers, so the seeds of a micro-batch are kept among these. `LanguageModel.forward`
puts them there, the router takes them, and nothing else has to do with them. (A checkpoint of a run holds them with the
other states; the next micro-batch replaces them.)
"""

from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch import Tensor

_STATE = "megatron_ext-sample-seeds"


def hand_down(seeds_B: Tensor) -> None:
    """Name the samples that are about to be routed, by a seed for each (int64)."""
    tracker = get_cuda_rng_tracker()
    tracker.set_states({**tracker.get_states(), _STATE: seeds_B})


def of_this_micro_batch() -> Tensor:
    """The seeds [B] of the samples that are being routed, for the first time or again."""
    seeds_B: Tensor = get_cuda_rng_tracker().get_states()[_STATE]
    return seeds_B
