"""Dense models to make MoE models of, and how."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_ext.testing.tiny import tiny_model
from megatron_ext.upcycling import check
from megatron_ext.upcycling.options import UpcycleOptions
from megatron_ext.upcycling.plan import make_plan
from megatron_ext.upcycling.run import upcycle

# The default of --tolerance.
TOLERANCE = 1e-5
DENSE = tiny_model()
DENSE_MODELS = {
    "grouped-query, untied": DENSE,
    "tied": replace(DENSE, untie_embeddings_and_output_weights=False),
    "GPT-2": replace(
        DENSE,
        num_query_groups=None,
        sliding_window=9,
        window_attn_skip_freq=2,
        attention_sinks=True,
        position_embedding_type="learned_absolute",
        normalization="LayerNorm",
        activation_func="gelu_tanh",
        gated_linear_unit=False,
        add_bias_linear=True,
        untie_embeddings_and_output_weights=False,
    ),
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "shared_expert_size": 40, "first_k_dense": 1, "router_std": 1.0}


def options(source: Path | list[Path], target: Path | str, **changes: Any) -> UpcycleOptions:
    sources = [str(path) for path in (source if isinstance(source, list) else [source])]
    return UpcycleOptions(**({"sources": sources, "target": str(target)} | EXPERTS | changes))


def made(o: UpcycleOptions) -> check.FunctionCheck:
    function = upcycle(make_plan(o)).function
    assert function is not None
    return function
