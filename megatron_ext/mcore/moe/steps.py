"""What the routers do with optimizer steps: expert biases and adaptive coefficients follow the loads of each."""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from megatron_ext.checkpoint.shards import TensorShard
from megatron_ext.mcore.moe.router import Router


class RouterSteps:
    """All routers of this rank's layers, as a `StepParticipant` (mcore/step_state.py)."""

    def __init__(self, routers: Sequence[Router], *, is_writer: bool) -> None:
        self._routers, self._is_writer = routers, is_writer
        self._moving = [router for router in routers if router.follows_load]

    def begin(self) -> None:
        """Forget what was counted since the last step that was taken."""
        for router in self._routers:
            router.begin_step()
            router.counts.begin_step()

    @torch.no_grad()
    def commit(self, group: dist.ProcessGroup) -> None:
        """Let biases and coefficients follow the loads of the step just taken, summed over `group`."""
        if not self._moving:
            return
        counts = torch.stack([router.step_counts for router in self._moving])
        dist.all_reduce(counts, group=group)
        for router, row in zip(self._moving, counts, strict=True):
            router.update_from_load(counts_E=row[:-1], dropped=row[-1])

    def discard(self) -> None:
        """Forget what the refused step counted."""
        for router in self._routers:
            router.begin_step()
            router.counts.discard_step()

    def state(self) -> list[TensorShard]:
        """The adaptive balance-loss coefficients, `router.coefficient.<loss>.<layer>`; biases are part of the model.

        Where a checkpoint has none, they begin at `moe_aux_loss_coeff`.
        """
        return [shard for router in self._routers for shard in self._coefficients(router)]

    def _coefficients(self, router: Router) -> Iterator[TensorShard]:
        if router.model.moe_adaptive_aux_loss is None:
            return
        assert router.layer_number is not None
        for kind, value in router.aux_loss_coeff.items():
            key = f"router.coefficient.{kind}.{router.layer_number - 1}"
            yield TensorShard(key, (1,), (0,), value.view(1), self._is_writer, optional=True)
