"""What build_trainable collects for the steps, and that a step costs one collective a kind of it."""

from unittest import mock

import torch.distributed as dist

from megatron_ext.config import AdaptiveAuxLoss, Fp8Precision, ParallelConfig
from megatron_ext.mcore.fp8.histories import AmaxHistories
from megatron_ext.mcore.fp8.kept_weights import KeptWeights
from megatron_ext.mcore.moe.steps import RouterSteps
from megatron_ext.proving.parity import Cell, build_cell
from megatron_ext.testing.pool import GlooPool
from megatron_ext.testing.tiny import tiny_model

MOVING = tiny_model(moe=True, moe_router_enable_expert_bias=True, moe_adaptive_aux_loss=AdaptiveAuxLoss(alpha_max=0.1))
DELAYED = Fp8Precision(kind="fp8", recipe="delayed")


def kinds(cell: Cell) -> list[type]:
    return [type(participant) for participant in build_cell(cell)[0].participants]


def test_only_what_moves_takes_part(pool: GlooPool) -> None:
    assert pool.run(1, kinds, Cell(tiny_model(), ParallelConfig())) == [[]]
    assert pool.run(1, kinds, Cell(tiny_model(moe=True), ParallelConfig())) == [[RouterSteps]]
    assert pool.run(1, kinds, Cell(MOVING, ParallelConfig(), DELAYED)) == [[RouterSteps, KeptWeights, AmaxHistories]]


def closed_steps() -> tuple[list[str], int, list[bool], list[bool]]:
    """Names of the state, collectives of a commit, and which of the state a refused and a taken step moved."""
    trainable, groups = build_cell(Cell(MOVING, ParallelConfig(), DELAYED))
    routers, kept, histories = trainable.participants
    assert isinstance(routers, RouterSteps)
    assert isinstance(kept, KeptWeights)
    assert isinstance(histories, AmaxHistories)
    shards = [shard for participant in trainable.participants for shard in participant.state()]

    def moved(close: str, *arguments: dist.ProcessGroup) -> list[bool]:
        before = [shard.data.clone() for shard in shards]
        for participant in trainable.participants:
            participant.begin()
        for module in trainable.chunks[0].modules():
            if hasattr(module, "step_counts"):
                module.step_counts += 1.0
                module.step_counts[0] += 100.0
            if hasattr(module, "latest"):
                module.latest += 2.0
        for participant in trainable.participants:
            getattr(participant, close)(*arguments)
        return [bool((shard.data != old).any()) for shard, old in zip(shards, before, strict=True)]

    refused = moved("discard")
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduced:
        taken = moved("commit", groups.stage)
    trainable.release()
    return [shard.key for shard in shards], reduced.call_count, refused, taken


def test_a_taken_step_moves_the_state_with_one_collective_a_kind(pool: GlooPool) -> None:
    ((keys, collectives, refused, taken),) = pool.run(1, closed_steps)
    assert collectives == 2
    assert not any(refused)
    assert all(taken)
    assert keys[:3] == [f"router.coefficient.aux_loss.{layer}" for layer in (1, 2, 3)]
    assert "optimizer.state.amax_history.decoder.layers.0.self_attention.linear_qkv.scaling" in keys
    assert len(keys) == len(set(keys)) == 3 + 2 * 4 + 2 * 4 + 2 * 3
