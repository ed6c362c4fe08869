"""Loss and output z-loss against their formula, with all logits and by parts: values, gradients, padding, TP."""

from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_ext.config import Fp32Precision, ModelConfig, ParallelConfig, RecomputeConfig, RuntimeConfig
from megatron_ext.mcore import cross_entropy, output_layer
from megatron_ext.mcore.initialization import initialize_weights
from megatron_ext.mcore.model import build_chunks
from megatron_ext.mcore.transformer_config import transformer_config
from megatron_ext.proving.parity import Cell, compare, run_cell, run_layout
from megatron_ext.runtime.process_groups import split_process_group
from megatron_ext.runtime.seeds import seed_everything
from megatron_ext.testing.pool import GlooPool
from megatron_ext.testing.tiny import tiny_model
from tests.distributed.layouts import TOLERANCE
from tests.distributed.runs import Part, open_part, train_steps

COEFFICIENT = 0.01
UPSTREAM = torch.rand(2, 2, 16, generator=torch.Generator().manual_seed(7))
"""The gradient of each token's cross-entropy and z-loss."""
# Two micro-batch rows and a padded vocabulary that TP2 splits with padding in the second half only.
MODEL = tiny_model(num_layers=1, make_vocab_size_divisible_by=64, init_method_std=0.2, output_z_loss_coeff=COEFFICIENT)


def build(model: ModelConfig, parallel: ParallelConfig, *, by_parts: bool = False) -> Any:
    split_process_group(parallel, RuntimeConfig(device="cpu"))
    seed_everything(0)
    config = transformer_config(model, parallel, Fp32Precision(kind="fp32"), RecomputeConfig(logits=by_parts))
    (network,) = build_chunks(model, parallel, config, torch.device("cpu"))
    initialize_weights(model, [network], 0)
    return network


def batch() -> tuple[Tensor, Tensor, Tensor]:
    tokens = torch.randint(0, 250, (2, 17), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1], torch.arange(16).expand(2, -1), tokens[:, 1:]


Parts = tuple[Tensor, list[Tensor]]


def gradients(network: Any) -> list[Tensor]:
    """Of the final norm, behind all that the output layer gives back, and of the output layer."""
    return [network.decoder.final_layernorm.weight.grad, network.output_layer.weight.grad]


def by_training(parallel: ParallelConfig, by_parts: bool) -> Parts:
    """Cross-entropy and z-loss of each token, [2, B, S], and gradients of their weighted sum."""
    with mock.patch.dict(cross_entropy.BLOCK, cpu=2**10), mock.patch.object(output_layer, "_MULTIPLE", 16):
        network = build(MODEL, parallel, by_parts=by_parts).train()
        tokens, positions, labels = batch()
        parts = network(tokens, positions, None, labels=labels)
        (parts * UPSTREAM).sum().backward()
    return parts.detach(), gradients(network)


def by_formula() -> Parts:
    network = build(MODEL, ParallelConfig()).eval()
    tokens, positions, labels = batch()
    logits = network(tokens, positions, None)[..., : MODEL.vocab_size].double()
    cross_entropy = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    parts = torch.stack((cross_entropy, COEFFICIENT * logits.logsumexp(dim=-1).square()))
    (parts * UPSTREAM).sum().backward()
    return parts.detach(), gradients(network)


@pytest.mark.parametrize("by_parts", [False, True], ids=["all logits", "by parts"])
@pytest.mark.parametrize("degree", [1, 2])
def test_value_and_gradient_are_the_formulas(degree: int, by_parts: bool, pool: GlooPool) -> None:
    """Of two ranks each has 9 parts of 16 entries, the last ones of padding alone; every token has another weight."""
    ((expected, (of_norm, of_weight)),) = pool.run(1, by_formula)
    parallel = ParallelConfig(tensor_model_parallel_size=degree, sequence_parallel=degree > 1)
    found = pool.run(degree, by_training, parallel, by_parts)
    # Under sequence parallelism a norm's gradient is of a rank's part of the tokens.
    whole_norm, whole_weight = sum(norm for _, (norm, _) in found), torch.cat([weight for _, (_, weight) in found])
    for parts, _ in found:
        pairs = ((parts, expected), (whole_norm, of_norm), (whole_weight, of_weight))
        errors = [float((m - e).abs().max() / e.abs().max()) for m, e in pairs]
        print(f"TP{degree}: z-loss {float(parts[1].mean()):.4f}, relative errors", *(f"{e:.1e}" for e in errors))
        # fp32 against float64 logits of an fp32 network: rounding of the softmax and of sums over 16 tokens.
        assert max(errors) < 1e-5


class Widths(TorchDispatchMode):
    """Notes the most numbers of any tensor that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(returned) if isinstance(x, Tensor) and x.shape[-1:] != WEIGHT]
        self.most = max([self.most, *sizes])
        return returned


WEIGHT = (16,)
"""The last dimension of the output layer's weight, below."""


def of_tensors(dtype: torch.dtype, by_parts: bool) -> tuple[list[Tensor], int]:
    """Losses, log(Z) and gradients of hidden states and weight, [64, 16] times [1000, 16]; and the largest tensor."""
    split_process_group(ParallelConfig(), RuntimeConfig(device="cpu"))
    group = parallel_state.get_tensor_model_parallel_group()
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, 16, generator=generator).to(dtype) for shape in ((64, 1), (1000,)))
    labels, upstream = torch.randint(0, 990, (64, 1), generator=generator), torch.rand(2, 64, 1, generator=generator)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    with mock.patch.dict(cross_entropy.BLOCK, cpu=2**13), Widths() as widths:
        if by_parts:
            found = output_layer._OutputLoss.apply(hidden, weight, None, labels, 990, group, False, False)
        else:
            found = cross_entropy.vocab_parallel_cross_entropy(hidden @ weight.t(), labels, 990, group)
        stacked = torch.stack(found)
        grads = torch.autograd.grad(stacked, (hidden, weight), upstream)
    return [stacked.detach(), *grads], widths.most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_are_the_whole_without_its_memory(dtype: torch.dtype, pool: GlooPool) -> None:
    ((expected, all_logits),) = pool.run(1, of_tensors, dtype, False)
    ((measured, most),) = pool.run(1, of_tensors, dtype, True)
    errors = [float((m - e).float().norm() / e.float().norm()) for m, e in zip(measured, expected, strict=True)]
    print(f"{dtype}: losses, hidden states, weight", *(f"{e:.1e}" for e in errors), f"; {most} numbers of {all_logits}")
    # Each part of the weight's gradient is one product, as it was. The hidden states' is a sum over 8 parts, on CPU of
    # products that are rounded to 2^-9 in bf16.
    assert max(errors[0], errors[2]) < 1e-6
    assert errors[1] < (1e-6 if dtype == torch.float32 else 5e-3)
    assert all_logits == 64 * 1000
    assert most <= 64 * 128


LAYOUT = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, pipeline_model_parallel_size=2)


def test_a_tied_embedding_learns_by_parts_in_another_layout(pool: GlooPool) -> None:
    model = tiny_model(num_layers=2, untie_embeddings_and_output_weights=False)
    alone = run_layout(pool, Cell(model, ParallelConfig(), steps=2), 1)
    again = Cell(model, LAYOUT, recompute=RecomputeConfig(logits=True), steps=2)
    difference = compare(run_layout(pool, again, 4), alone)
    print(f"loss {difference.loss:.1e}, gradient norm {difference.norm:.1e}")
    assert difference.worst < TOLERANCE


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
