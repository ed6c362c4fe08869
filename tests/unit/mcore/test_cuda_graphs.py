"""Why layers are not captured as CUDA graphs: what a graph would not repeat, and what megatron-core does with one.

A graph repeats the operations on tensors that it was captured from, at their addresses, and no Python. So does a trace
by `make_fx`, on any device.
"""

import inspect

import pytest
import torch
from megatron.core.transformer.cuda_graphs import CudaGraphManager
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from megatron_ext.config import Fp8Precision, Fp32Precision, ParallelConfig, RecomputeConfig
from megatron_ext.errors import ConfigError
from megatron_ext.mcore.fp8.quantize import E4M3
from megatron_ext.mcore.fp8.scaling import Scaling
from megatron_ext.mcore.transformer_config import transformer_config
from megatron_ext.testing.pool import GlooPool
from megatron_ext.testing.tiny import tiny_model
from tests.unit.mcore.moe.gates import build_router, hidden_states

FIELDS = [name for name in TransformerConfig.__dataclass_fields__ if "cuda_graph" in name or "cudagraph" in name]


@pytest.mark.parametrize("name", FIELDS)
def test_graphs_are_refused(name: str) -> None:
    model = tiny_model(transformer_overrides={name: "local"})
    with pytest.raises(ConfigError, match=rf"transformer_overrides\.{name}: .*Remove it"):
        transformer_config(model, ParallelConfig(), Fp32Precision(kind="fp32"), RecomputeConfig())


def counted_in_a_step() -> tuple[float, float]:
    """Assignments that a router counts in the second of two steps: by itself, and by what was captured of the first."""
    router = build_router(tiny_model(moe=True, moe_router_enable_expert_bias=True))
    hidden = hidden_states()
    captured = make_fx(lambda states: router(states)[0])(hidden)
    found = []
    for route in (router, captured):
        router.begin_step()
        route(hidden)
        found.append(float(router.step_counts.sum()))
    return found[0], found[1]


def test_a_graph_would_not_count_what_moves_expert_biases(pool: GlooPool) -> None:
    assert pool.run(1, counted_in_a_step) == [(16 * 4 * 2, 0)]


def test_a_graph_would_not_cast_weights_anew() -> None:
    """What is cast once a step is cast by the first pass alone: the graph of another has the old bits."""
    scaling = Scaling(Fp8Precision(kind="fp8", recipe="tensorwise"), gradient_format=E4M3, triton=False)
    weight = torch.randn(32, 32)

    def values(weight: Tensor) -> Tensor:
        return scaling.weight(weight)[0].values.float()

    scaling.open_step()
    values(weight)
    captured = make_fx(values)(weight)
    weight.mul_(-1)
    scaling.open_step()
    assert torch.equal(captured(weight), -values(weight))


def test_megatron_core_replays_in_validation_what_it_captured_in_training() -> None:
    """Once there are graphs, a layer's call asks neither for its mode nor whether anything is learned."""
    source = inspect.getsource(CudaGraphManager.__call__)
    created = source.partition("if _CudagraphGlobalRecord.cudagraph_created:")[2].partition("else:")[0]
    assert "replay_graph_capture" in created
    assert "self.training" not in created.partition("runner =")[2]
