"""Names the nodes whose ranks are behind the others in every step, which all others then wait for."""

import socket
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_ext.monitoring.events import Event, Tell
from megatron_ext.training.hooks.base import Hook, StepDone
from megatron_ext.training.session import Session

SLOW = 1.3
"""How many times the median of its pipeline stage a slow rank needs for its own part of a step."""
_NOTICEABLE = 0.01
"""Seconds below which nobody minds."""
_LOOKS = 2
"""Looks in a row at which a rank is slow before it is named."""
_STEPS = 10
"""Steps between two looks, at least."""


@dataclass(frozen=True)
class Behind:
    """A rank that is slow."""

    rank: int
    seconds: float
    usual: float
    """Median of its pipeline stage."""


class SlowRanks(Hook):
    """Looks every so many steps, as often as is reported but for short steps; costs one small all-gather then."""

    def __init__(self, log_interval: int, tell: Tell) -> None:
        self._interval = log_interval * -(-_STEPS // log_interval)
        self._tell = tell
        self._hosts: list[str] = []
        self._stages: list[int] = []
        self._looks: dict[int, int] = {}
        self._named: list[str] = []

    def on_start(self, session: Session) -> None:
        """Have the end of this rank's own part of a step marked, and learn who is where."""
        if dist.get_world_size() == 1:
            return
        here: list[Any] = [None] * dist.get_world_size()
        stage = session.groups.pp.rank()
        dist.all_gather_object(here, (socket.gethostname(), stage))
        self._hosts, self._stages = [host for host, _ in here], [stage for _, stage in here]
        config, pace = session.trainable.config, session.pace
        finish = config.finalize_model_grads_func

        def marked(*arguments: Any, **options: Any) -> Any:
            pace.gradients_ready()
            return finish(*arguments, **options)

        config.finalize_model_grads_func = marked

    def after_step(self, session: Session, done: StepDone) -> None:
        """Look where it is time to."""
        if not self._hosts or not done.is_due(self._interval):
            return
        own = torch.tensor([session.pace.seconds()], device=session.device)
        gathered = [torch.zeros_like(own) for _ in self._hosts]
        dist.all_gather(gathered, own, group=session.groups.world)
        # One wait for the device, not one a rank.
        behind = {slow.rank: slow for slow in ranks_behind(torch.cat(gathered).tolist(), self._stages)}
        self._looks = {rank: self._looks.get(rank, 0) + 1 for rank in behind}
        named = nodes_behind({rank: slow for rank, slow in behind.items() if self._looks[rank] >= _LOOKS}, self._hosts)
        if list(named) != self._named:
            self._named = list(named)
            text = "; ".join(named.values()) or "no node is slow any more"
            self._tell(Event("slow_rank", done.iteration, text, {"nodes": self._named}))


def ranks_behind(seconds: Sequence[float], stages: Sequence[int]) -> list[Behind]:
    """The slow ones, compared with the ranks of their own pipeline stage: stages have other layers, and wait."""
    usual = {
        stage: statistics.median_low([own for own, its in zip(seconds, stages, strict=True) if its == stage])
        for stage in set(stages)
    }
    return [
        Behind(rank, own, usual[stage])
        for rank, (own, stage) in enumerate(zip(seconds, stages, strict=True))
        if own > SLOW * usual[stage] and own - usual[stage] > _NOTICEABLE
    ]


def nodes_behind(behind: Mapping[int, Behind], hosts: Sequence[str]) -> dict[str, str]:
    """Each node with slow ranks, and what there is to say of it."""
    nodes = defaultdict(list)
    for rank, slow in behind.items():
        nodes[hosts[rank]].append(slow)
    said = {}
    for host, ranks in nodes.items():
        worst = max(ranks, key=lambda slow: slow.seconds / slow.usual if slow.usual else slow.seconds)
        which = ", ".join(str(slow.rank) for slow in ranks)
        said[host] = (
            f"node {host} is slow: its rank{'s' if len(ranks) > 1 else ''} {which} of {hosts.count(host)} need"
            f"{'' if len(ranks) > 1 else 's'} up to {worst.seconds:.3g} s for their part of a step, and others of the "
            f"stage {worst.usual:.3g} s"
        )
    return said
