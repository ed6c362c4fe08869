"""Dropout: the share that is dropped, which ranks drop alike, none in evaluation, the same again under recompute."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ext.config import Fp32Precision, ModelConfig, ParallelConfig, RecomputeConfig, RuntimeConfig
from megatron_ext.mcore.attention import ScaledDotProductAttention
from megatron_ext.mcore.initialization import initialize_weights
from megatron_ext.mcore.model import build_chunks
from megatron_ext.mcore.transformer_config import transformer_config
from megatron_ext.proving.parity import Cell, run_cell
from megatron_ext.runtime.process_groups import split_process_group
from megatron_ext.runtime.seeds import seed_everything
from megatron_ext.testing.pool import GlooPool
from megatron_ext.testing.tiny import tiny_model
from tests.distributed.runs import Part, open_part, train_steps

SHARE = 0.3
MODEL = tiny_model(moe=True, hidden_dropout=SHARE, attention_dropout=SHARE, num_layers=2)
DENSE = tiny_model(hidden_dropout=SHARE, attention_dropout=SHARE, num_layers=2)
TP = ParallelConfig(tensor_model_parallel_size=2)
TP_SP = replace(TP, sequence_parallel=True)


def build(model: ModelConfig, parallel: ParallelConfig) -> Any:
    split_process_group(parallel, RuntimeConfig(device="cpu"))
    seed_everything(0)
    config = transformer_config(model, parallel, Fp32Precision(kind="fp32"), RecomputeConfig())
    (network,) = build_chunks(model, parallel, config, torch.device("cpu"))
    initialize_weights(model, [network], 0)
    return network


def attention_to_the_first_token(parallel: ParallelConfig) -> tuple[Tensor, Tensor]:
    """What the first token of 64 samples and each head takes from itself, in training and in evaluation."""
    network = build(DENSE, parallel)
    core: ScaledDotProductAttention = network.decoder.layers[0].self_attention.core_attention
    heads = 4 // parallel.tensor_model_parallel_size
    ones = torch.ones(2, 64, heads, 16)
    return core.train()(ones, ones, ones, None)[0], core.eval()(ones, ones, ones, None)[0]


@torch.no_grad()
def embedded(parallel: ParallelConfig) -> tuple[Tensor, Tensor]:
    """The embedding of one token many times over, relative to its weights, in training and in evaluation."""
    network = build(DENSE, parallel)
    tokens = torch.full((8, 32), 7)
    exact = network.eval().embedding(tokens, tokens)
    return network.train().embedding(tokens, tokens) / exact, exact


def assert_share(kept: Tensor) -> None:
    """`kept` is 0 in the share to drop, to within 4 standard deviations, and 1 / (1 - share) elsewhere."""
    dropped = kept == 0
    deviation = (SHARE * (1 - SHARE) / kept.numel()) ** 0.5
    print(f"dropped {float(dropped.float().mean()):.4f} of {kept.numel()}, 4 deviations are {4 * deviation:.4f}")
    assert abs(float(dropped.float().mean()) - SHARE) < 4 * deviation
    assert torch.allclose(kept[~dropped], torch.tensor(1 / (1 - SHARE)))


def test_attention_drops_its_share_and_heads_of_other_ranks_others(pool: GlooPool) -> None:
    ((training, evaluation),) = pool.run(1, attention_to_the_first_token, ParallelConfig())
    assert_share(training.view(64, 4, 16)[..., 0])
    assert torch.equal(evaluation, torch.ones_like(evaluation))
    (first, _), (second, _) = pool.run(2, attention_to_the_first_token, TP)
    assert not torch.equal(first, second)


def test_the_embedding_drops_its_share_alike_on_the_ranks_that_hold_it_whole(pool: GlooPool) -> None:
    ((training, _),) = pool.run(1, embedded, ParallelConfig())
    assert_share(training)
    (first, _), (second, _) = pool.run(2, embedded, TP)
    assert torch.equal(first, second), "TP ranks must agree on what all of them hold"
    (first, _), (second, _) = pool.run(2, embedded, TP_SP)
    assert not torch.equal(first, second), "each has its own half of the sequence"
    (first, _), (second, _) = pool.run(2, embedded, ParallelConfig())
    assert not torch.equal(first, second), "data-parallel ranks have other tokens"


@torch.no_grad()
def evaluated(model: ModelConfig) -> Tensor:
    network = build(model, ParallelConfig()).eval()
    tokens = torch.arange(32).view(2, 16)
    return network(tokens, tokens % 16, None)


def test_evaluation_drops_nothing(pool: GlooPool) -> None:
    without = replace(MODEL, hidden_dropout=0.0, attention_dropout=0.0)
    assert torch.equal(pool.run(1, evaluated, MODEL)[0], pool.run(1, evaluated, without)[0])


@pytest.mark.parametrize(
    ("model", "processes", "parallel"),
    [(MODEL, 1, ParallelConfig()), (DENSE, 2, TP), (MODEL, 2, TP_SP)],
    ids=["one process", "TP2", "TP2 SP"],
)
def test_recompute_draws_the_same_numbers_again(
    model: ModelConfig, processes: int, parallel: ParallelConfig, pool: GlooPool
) -> None:
    cell = Cell(model, parallel, steps=2)
    full = replace(cell, recompute=RecomputeConfig(granularity="full"))
    core = replace(cell, recompute=RecomputeConfig(granularity="selective", modules=["core_attn"]))
    plain = pool.run(processes, run_cell, cell)
    assert pool.run(processes, run_cell, full) == plain
    assert pool.run(processes, run_cell, core) == plain
    without = replace(cell, model=replace(model, hidden_dropout=0.0, attention_dropout=0.0))
    assert pool.run(processes, run_cell, without) != plain


def norms_after_training(part: Part) -> dict[str, Tensor]:
    with open_part(part) as session:
        train_steps(session, 2)
        return {name: p.detach().clone() for name, p in session.chunks[0].named_parameters() if "layernorm" in name}


def test_what_tp_ranks_share_stays_the_same(pool: GlooPool, tmp_path: Any) -> None:
    first, second = pool.run(2, norms_after_training, Part(DENSE, tmp_path, TP))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(p, torch.ones_like(p)) for p in first.values())
