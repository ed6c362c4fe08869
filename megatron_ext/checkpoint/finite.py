"""Are the numbers of a rank's shards finite? Asked of every save: a run that diverged must not replace a good state."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_ext.checkpoint.shards import TensorShard
from megatron_ext.errors import CheckpointError


class NotFiniteError(CheckpointError):
    """What was to be saved holds NaN or infinity."""


def require_finite(shards: Sequence[TensorShard]) -> None:
    """Raise NotFiniteError where a number of this rank's shards is not finite; it names a tensor.

    Reads each shard once, at the speed of memory, and waits once for the device.
    """
    floats = [shard for shard in shards if shard.is_writer and shard.data.is_floating_point() and shard.data.numel()]
    # NaN and infinity survive every addition, so a finite sum is that of finite numbers. The reverse need not hold.
    suspects = [shard for shard, fine in zip(floats, _are_finite([s.data for s in floats]), strict=True) if not fine]
    bad = {shard.key for shard in suspects if not bool(torch.isfinite(shard.data).all())}
    if bad:
        raise NotFiniteError(
            f"{len(bad)} tensors hold NaN or infinity, such as {min(bad)}: the run has diverged. Start it again to go "
            "on from the newest checkpoint, with a lower optimizer.lr or past the bad batches (train.skip_steps)"
        )


def _are_finite(tensors: Sequence[Tensor]) -> list[bool]:
    """Whether the sum of each is."""
    by_device: dict[torch.device, list[int]] = defaultdict(list)
    for number, tensor in enumerate(tensors):
        by_device[tensor.device].append(number)
    fine = [False] * len(tensors)
    for numbers in by_device.values():
        sums = torch.stack([_sum(tensors[number]).float() for number in numbers])
        for number, is_finite in zip(numbers, torch.isfinite(sums).tolist(), strict=True):
            fine[number] = is_finite
    return fine


def _sum(tensor: Tensor) -> Tensor:
    # There is no addition of eight-bit floats.
    return (tensor.float() if tensor.itemsize == 1 else tensor).sum()
