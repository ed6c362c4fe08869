"""What build_trainable collects for the steps, what a step costs, and what overlapped communication relies on."""

from dataclasses import replace
from unittest import mock

import pytest
import torch.distributed as dist

from megatron_ext.config import (
    AdaptiveAuxLoss,
    Fp8Precision,
    LearnedNoise,
    LoraConfig,
    LoraTarget,
    MultiLatentAttention,
    ParallelConfig,
    PreferenceTask,
)
from megatron_ext.mcore.fp8.histories import AmaxHistories
from megatron_ext.mcore.fp8.kept_weights import KeptWeights
from megatron_ext.mcore.moe.steps import RouterSteps
from megatron_ext.proving.parity import Cell, build_cell, train_cell
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


NOISY = tiny_model(
    moe=True,
    moe_router_noise=LearnedNoise(kind="learned"),
    moe_shared_expert_gate=True,
    add_bias_linear=True,
    attention_sinks=True,
)
LATENT = tiny_model(
    moe=True,
    multi_latent_attention=MultiLatentAttention(
        kv_lora_rank=24, q_lora_rank=40, qk_head_dim=8, qk_pos_emb_head_dim=8, v_head_dim=8
    ),
    num_query_groups=None,
)
EVERYWHERE = LoraConfig(targets=[LoraTarget(match=["layers.*", "embedding.*", "output_layer"], rank=2)])
OVERLAPPING = {
    "learned noise, shared experts with gate and biases, sinks": Cell(NOISY, ParallelConfig()),
    "its preferences": Cell(NOISY, ParallelConfig(), task=PreferenceTask(kind="preference", loss="orpo")),
    "latent": Cell(LATENT, ParallelConfig()),
    "latent, adapters": Cell(LATENT, ParallelConfig(), adapters=EVERYWHERE),
}


def not_waited_for(cell: Cell) -> tuple[list[str], list[str]]:
    """Trained parameters whose module is never called, and those that get no gradient."""
    trainable, groups = build_cell(cell)
    (chunk,) = trainable.chunks
    called, ready = set(), set()
    modules = {module: name for name, module in chunk.named_modules()}
    for module in modules:
        module.register_forward_pre_hook(lambda module, _: called.add(module))
    trained = {name: parameter for name, parameter in chunk.named_parameters() if parameter.requires_grad}
    for name, parameter in trained.items():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: ready.add(name))
    train_cell(cell, trainable, groups)
    trainable.release()
    owners = {f"{modules[module]}.{name}" for module in called for name, _ in module.named_parameters(recurse=False)}
    return sorted(trained.keys() - owners), sorted(trained.keys() - ready)


@pytest.mark.parametrize("cell", OVERLAPPING.values(), ids=OVERLAPPING.keys())
def test_overlapped_messages_have_what_they_wait_for(cell: Cell, pool: GlooPool) -> None:
    """megatron-core gathers weights where their module is called, and reduces gradients once each has come."""
    assert pool.run(1, not_waited_for, replace(cell, steps=1)) == [([], [])]
