"""Every rule between keys: what it refuses, with both keys and both values, and what it lets pass."""

from typing import Any

import pytest

from megatron_ext.config.rules import RULES
from tests.support.minimal_run import faults, load, mapping
from tests.unit.config import violations_of_dispatch, violations_of_models, violations_of_runs
from tests.unit.config.parts_of_runs import ADAPTED, EVERYTHING, LATENT, LLAMA3, MOE, YARN

VIOLATIONS = [
    *violations_of_dispatch.VIOLATIONS,
    *violations_of_models.VIOLATIONS,
    *violations_of_runs.VIOLATIONS,
]


@pytest.mark.parametrize(("sections", "expected"), VIOLATIONS, ids=[v[1][0][:40] for v in VIOLATIONS])
def test_violation_names_keys_values_and_the_way_out(sections: dict[str, dict[str, Any]], expected: list[str]) -> None:
    message = faults(mapping(**sections))
    for part in expected:
        assert part in message


WRITTEN_FOR_MANY_KEYS = (
    "_needs_experts",
    "_needs_history",
    "_is_said_once",
    "_not_with_latent_attention",
    "_width_fits_kernel",
)


def test_every_rule_can_be_violated() -> None:
    """No rule is dead: each complains about at least one of the violations above."""
    import megatron_ext.config.load as load_module

    complained: set[int] = set()
    real = load_module.violations

    def spy(values: dict[str, Any]) -> list[str]:
        complained.update(i for i, r in enumerate(RULES) if r.violations(values))
        return real(values)

    load_module.violations = spy  # type: ignore[assignment]
    try:
        for sections, _ in VIOLATIONS:
            faults(mapping(**sections))
    finally:
        load_module.violations = real
    # Of the rules that are written once for many keys, one violated example stands for all.
    dead = [r for i, r in enumerate(RULES) if i not in complained and r.check.__name__ not in WRITTEN_FOR_MANY_KEYS]
    assert not dead, [r.keys for r in dead]


def test_legal_neighbours_pass() -> None:
    load(mapping(model=MOE, precision={"kind": "bf16"}, parallel=violations_of_dispatch.FLEX))
    load(mapping(model=violations_of_dispatch.SHARED, parallel=violations_of_dispatch.OVERLAPPED))
    load(mapping(**{**ADAPTED, "adapters": EVERYTHING, "model": {**MOE, "moe_shared_expert_intermediate_size": 64}}))
    whole_experts = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_tensor_parallel_size": 1}
    whole_experts["expert_model_parallel_size"] = 2
    load(mapping(**{**ADAPTED, "model": MOE, "parallel": whole_experts}))
    split_experts = {**whole_experts, "expert_tensor_parallel_size": 2}
    attention = {"targets": [{"match": ["self_attention.*", "output_layer"]}]}
    load(mapping(**{**ADAPTED, "adapters": attention, "model": MOE, "parallel": split_experts}))
    # Where every layer is MoE nothing has the dense width.
    everywhere = MOE | {"moe_ffn_hidden_size": 64, "ffn_hidden_size": 97}
    load(mapping(model=everywhere, parallel={"tensor_model_parallel_size": 2, "sequence_parallel": True}))
    load(mapping(model={"rope_scaling": {"kind": "dynamic", "factor": 2.0}}, data={"sequence_length": 8192}))
    load(mapping(model={"rope_scaling": LLAMA3, "rotary_percent": 0.5, "qk_layernorm": "projection"}))
    load(mapping(model={"multi_latent_attention": LATENT, "rope_scaling": YARN, "hidden_size": 66}))
    load(mapping(model={"position_embedding_type": "learned_absolute", "kv_channels": 7, "normalization": "LayerNorm"}))
    load(mapping(data={"sequence_length": 60}, parallel={"context_parallel_size": 2}))
    load(mapping(data={"reset_position_ids": True, "reset_attention_mask": True}))
    load(mapping(precision={"kind": "fp8", "recipe": "delayed", "margin": 1, "num_layers_at_end_in_bf16": 3}))
    load(mapping(precision={"kind": "fp8"}, model={"ffn_hidden_size": 104}, runtime={"device": "cpu"}))
    load(mapping(precision={"kind": "fp8", "fp8_wgrad": False}, data={"sequence_length": 63}))
    load(mapping(model=MOE | {"moe_router_topk": 1, "moe_router_pre_softmax": True}))
    load(
        mapping(
            model=MOE,
            parallel={
                "tensor_model_parallel_size": 2,
                "sequence_parallel": True,
                "expert_model_parallel_size": 2,
                "expert_tensor_parallel_size": 1,
                "pipeline_model_parallel_size": 2,
                "virtual_pipeline_model_parallel_size": 2,
            },
        )
    )
