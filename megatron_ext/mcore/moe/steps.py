"""What happens to all routers when a step begins, and when it was taken."""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_ext.mcore.moe.router import Router


def begin_step(routers: Sequence[Router]) -> None:
    """Forget what was counted since the last step that was taken."""
    for router in routers:
        router.begin_step()


def end_step(routers: Sequence[Router], group: dist.ProcessGroup) -> None:
    """Let biases and coefficients follow the loads of the step just taken, summed over `group`.

    Args:
        routers: those of this pipeline stage; every rank of the stage must call this.
        group: the ranks of the stage.
    """
    moving = [router for router in routers if router.follows_load]
    if not moving:
        return
    counts = torch.stack([router.step_counts for router in moving])
    dist.all_reduce(counts, group=group)
    for router, row in zip(moving, counts, strict=True):
        router.update_from_load(counts_E=row[:-1], dropped=row[-1])
