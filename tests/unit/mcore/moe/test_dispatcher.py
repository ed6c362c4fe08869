"""The local dispatcher against sums over experts in float64, and against megatron-core's dispatcher."""

import pytest
import torch

from megatron_ext.config import Fp32Precision, ParallelConfig, RecomputeConfig, RuntimeConfig
from megatron_ext.mcore.model import build_chunks
from megatron_ext.mcore.moe.dispatcher import LocalTokenDispatcher, MoELayer
from megatron_ext.mcore.transformer_config import transformer_config
from megatron_ext.runtime.process_groups import split_process_group
from megatron_ext.runtime.seeds import seed_everything
from megatron_ext.testing.pool import GlooPool
from megatron_ext.testing.tiny import tiny_model


def moe_layer(parallel: ParallelConfig) -> MoELayer:
    split_process_group(parallel, RuntimeConfig(device="cpu"))
    seed_everything(0)
    model = tiny_model(moe=True)
    config = transformer_config(model, parallel, Fp32Precision(kind="fp32"), RecomputeConfig())
    (chunk,) = build_chunks(model, parallel, config, torch.device("cpu"))
    return next(module for module in chunk.modules() if isinstance(module, MoELayer))


def errors(dtype: torch.dtype, drops: bool, gathers: bool) -> list[float]:
    """Errors of output and both gradients, where each expert multiplies its tokens by its number."""
    dispatcher = moe_layer(ParallelConfig()).token_dispatcher
    assert isinstance(dispatcher, LocalTokenDispatcher)
    dispatcher._sums_by_gathering = lambda hidden: gathers
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 3, 64, generator=generator).to(dtype).requires_grad_()
    chosen_TE = torch.zeros(15, 4, dtype=torch.bool)
    chosen_TE.scatter_(1, torch.rand(15, 4, generator=generator).topk(2).indices, True)
    if drops:
        chosen_TE[:4] = False
        chosen_TE[4, chosen_TE[4].int().argmax()] = False
    weights_TE = (torch.rand(15, 4, generator=generator) * chosen_TE).requires_grad_()
    upstream = torch.randn(5, 3, 64, generator=generator).to(dtype)
    rows, weights = dispatcher.token_dispatch(*dispatcher.dispatch_preprocess(hidden, chosen_TE, weights_TE))
    rows, counts, weights = dispatcher.dispatch_postprocess(rows, weights)
    assert torch.equal(counts, chosen_TE.sum(0))
    number = torch.arange(1.0, 5.0).repeat_interleave(counts)
    rows = (rows * (number * weights).unsqueeze(-1)).to(dtype)
    output = dispatcher.combine_postprocess(dispatcher.token_combine(dispatcher.combine_preprocess(rows)))
    exact, exact_weights = hidden.detach().double().requires_grad_(), weights_TE.detach().double().requires_grad_()
    factor_T = (exact_weights * torch.arange(1.0, 5.0).double() * chosen_TE).sum(-1)
    reference = exact * factor_T.view(5, 3, 1)
    measured = (output, *torch.autograd.grad(output, (hidden, weights_TE), upstream))
    expected = (reference, *torch.autograd.grad(reference, (exact, exact_weights), upstream.double()))
    return [float(((m - e).abs().max() / e.abs().max()).detach()) for m, e in zip(measured, expected, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("drops", [False, True], ids=["dropless", "drops"])
@pytest.mark.parametrize("gathers", [False, True], ids=["as on CPU", "as on CUDA"])
def test_equals_the_sum_over_experts(dtype: torch.dtype, drops: bool, gathers: bool, pool: GlooPool) -> None:
    (measured,) = pool.run(1, errors, dtype, drops, gathers)
    print(dtype, measured)
    # fp32: a few operations of 6e-8; bf16: each row and each sum is rounded, 2^-9 of a value.
    assert max(measured) < (1e-6 if dtype == torch.float32 else 8e-3)


def with_both_dispatchers() -> float:
    """Difference of a MoE layer's output with ours and with megatron-core's dispatcher."""
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    layer = moe_layer(ParallelConfig())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.normal_(0, 0.1, generator=generator)
    hidden = torch.randn(6, 2, 64, generator=generator)
    ours = layer(hidden)[0]
    layer.token_dispatcher = MoEAlltoAllTokenDispatcher(
        4, list(range(4)), config=layer.config, pg_collection=get_default_pg_collection()
    )
    return float((layer(hidden)[0] - ours).abs().max().detach())


def test_equals_the_dispatcher_it_stands_for(pool: GlooPool) -> None:
    """The same rows in the same order: not a bit differs."""
    assert pool.run(1, with_both_dispatchers) == [0.0]


def dispatcher_of(parallel: ParallelConfig) -> str:
    return type(moe_layer(parallel).token_dispatcher).__name__


def test_experts_on_several_ranks_need_communication(pool: GlooPool) -> None:
    names = set(pool.run(2, dispatcher_of, ParallelConfig(expert_model_parallel_size=2)))
    assert names == {"MoEAlltoAllTokenDispatcher"}
