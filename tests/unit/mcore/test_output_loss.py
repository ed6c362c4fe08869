"""The output z-loss against its formula: value, gradient, padding, tensor parallelism; the loss stays what it is."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ext.config import Fp32Precision, ModelConfig, ParallelConfig, RecomputeConfig, RuntimeConfig
from megatron_ext.mcore.initialization import initialize_weights
from megatron_ext.mcore.model import build_chunks
from megatron_ext.mcore.transformer_config import transformer_config
from megatron_ext.proving.parity import Cell, run_cell
from megatron_ext.runtime.process_groups import split_process_group
from megatron_ext.runtime.seeds import seed_everything
from megatron_ext.testing.pool import GlooPool
from megatron_ext.testing.tiny import tiny_model
from tests.distributed.runs import Part, open_part, train_steps

COEFFICIENT = 0.01
# Two micro-batch rows and a padded vocabulary that TP2 splits with padding in the second half only.
MODEL = tiny_model(num_layers=1, make_vocab_size_divisible_by=64, init_method_std=0.2, output_z_loss_coeff=COEFFICIENT)


def build(model: ModelConfig, parallel: ParallelConfig) -> Any:
    split_process_group(parallel, RuntimeConfig(device="cpu"))
    seed_everything(0)
    config = transformer_config(model, parallel, Fp32Precision(kind="fp32"), RecomputeConfig())
    (network,) = build_chunks(model, parallel, config, torch.device("cpu"))
    initialize_weights(model, [network], 0)
    return network


def batch() -> tuple[Tensor, Tensor, Tensor]:
    tokens = torch.randint(0, 250, (2, 17), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1], torch.arange(16).expand(2, -1), tokens[:, 1:]


def parts_and_gradient(parallel: ParallelConfig) -> tuple[Tensor, Tensor]:
    """Cross-entropy and z-loss of each token, [2, B, S], and the gradient of the final norm of their sum's mean."""
    network = build(MODEL, parallel).train()
    tokens, positions, labels = batch()
    parts = network(tokens, positions, None, labels=labels)
    parts.sum(dim=0).mean().backward()
    return parts.detach(), network.decoder.final_layernorm.weight.grad


def by_formula() -> tuple[Tensor, Tensor]:
    network = build(MODEL, ParallelConfig()).eval()
    tokens, positions, labels = batch()
    logits = network(tokens, positions, None)[..., : MODEL.vocab_size].double()
    cross_entropy = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    parts = torch.stack((cross_entropy, COEFFICIENT * logits.logsumexp(dim=-1).square()))
    parts.sum(dim=0).mean().backward()
    return parts.detach(), network.decoder.final_layernorm.weight.grad


@pytest.mark.parametrize("degree", [1, 2])
def test_value_and_gradient_are_the_formulas(degree: int, pool: GlooPool) -> None:
    ((expected, gradient),) = pool.run(1, by_formula)
    parallel = ParallelConfig(tensor_model_parallel_size=degree)
    for parts, measured in pool.run(degree, parts_and_gradient, parallel):
        errors = [float((m - e).abs().max() / e.abs().max()) for m, e in ((parts, expected), (measured, gradient))]
        print(f"TP{degree}: z-loss {float(parts[1].mean()):.4f}, relative errors {errors[0]:.1e}, {errors[1]:.1e}")
        # fp32 against float64 logits of an fp32 network: rounding of the softmax and of sums over 16 tokens.
        assert max(errors) < 1e-5


def evaluated() -> tuple[int, ...]:
    tokens, positions, labels = batch()
    return tuple(build(MODEL, ParallelConfig()).eval()(tokens, positions, None, labels=labels).shape)


def test_evaluation_has_none(pool: GlooPool) -> None:
    assert pool.run(1, evaluated) == [(2, 16)]


def reported(part: Part) -> tuple[float, float]:
    with open_part(part) as session:
        real, results = session.step, []
        session.step = lambda batch: results.append(real(batch)) or results[-1]  # type: ignore[func-returns-value]
        train_steps(session, 1)
        return float(results[0].loss), float(results[0].losses.get("output_z_loss", 0.0))


def test_the_reported_loss_is_the_cross_entropy(pool: GlooPool, tmp_path: Any) -> None:
    loss, z_loss = pool.run(1, reported, Part(MODEL, tmp_path))[0]
    without, none = pool.run(1, reported, Part(tiny_model(num_layers=1, init_method_std=0.2), tmp_path))[0]
    assert (loss, none) == (pytest.approx(without, rel=1e-6), 0.0)
    assert z_loss > 0.1
    cells = [Cell(tiny_model(output_z_loss_coeff=c), ParallelConfig(), steps=1) for c in (0.0, 1e-2)]
    plain, with_z = (pool.run(1, run_cell, cell)[0] for cell in cells)
    assert plain.losses == with_z.losses
    assert plain.norms != with_z.norms
