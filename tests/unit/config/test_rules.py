"""Every rule between keys: what it refuses, with both keys and both values, and what it lets pass."""

from typing import Any

import pytest

from megatron_ext.config.rules import RULES
from tests.unit.config.test_load import faults, load, mapping

MOE = {"num_moe_experts": 8}
TE = {"backend": "transformer_engine"}


def fp8(recipe: str, **fields: Any) -> dict[str, Any]:
    return {"kind": "fp8", "recipe": recipe, **fields}


VIOLATIONS: list[tuple[dict[str, dict[str, Any]], list[str]]] = [
    ({"model": {"num_query_groups": 3}}, ["model.num_attention_heads = 4", "model.num_query_groups = 3"]),
    ({"model": {"hidden_size": 66}}, ["model.hidden_size = 66", "kv_channels"]),
    ({"model": {"kv_channels": 7}}, ["model.head_dim = 7", "even"]),
    ({"model": MOE | {"moe_router_topk": 9}}, ["model.moe_router_topk = 9", "model.num_moe_experts = 8"]),
    ({"model": MOE | {"moe_router_topk": 1}}, ["moe_router_pre_softmax: true"]),
    ({"model": MOE | {"moe_layer_freq": [1, 0]}}, ["model.moe_layer_freq = [1, 0]", "one a layer"]),
    ({"model": MOE | {"moe_layer_freq": 0}}, ["model.moe_layer_freq = 0: must be greater than or equal to 1"]),
    ({"model": MOE | {"moe_first_k_dense": 4}}, ["model.moe_first_k_dense = 4", "no layer is left"]),
    ({"model": MOE | {"moe_layer_freq": [0, 0, 0, 0]}}, ["no layer is left"]),
    ({"model": MOE | {"moe_first_k_dense": 1, "moe_layer_freq": 4}}, ["no layer is left"]),
    ({"model": {"moe_router_pre_softmax": True}}, ["no meaning in a dense model"]),
    ({"recompute": {"modules": ["mlp"]}}, ["has no effect; set granularity: selective"]),
    ({"recompute": {"granularity": "full", "modules": ["mlp"]}}, ["set granularity: selective"]),
    ({"recompute": {"granularity": "selective", "modules": []}}, ["nothing would be recomputed"]),
    ({"recompute": {"num_layers": 2}}, ["have no effect; set granularity: full"]),
    (
        {"model": MOE | {"moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.1}},
        ["without a balance loss"],
    ),
    ({"model": {"moe_aux_loss_coeff": 0.1}}, ["model.moe_aux_loss_coeff = 0.1", "no meaning in a dense model"]),
    ({"model": {"moe_gating_normalization": {}}}, ["no meaning in a dense model"]),
    ({"parallel": {"expert_model_parallel_size": 2}}, ["no meaning in a dense model"]),
    (
        {"parallel": {"tensor_model_parallel_size": 3}},
        ["model.num_attention_heads = 4", "parallel.tensor_model_parallel_size = 3"],
    ),
    ({"model": {"num_query_groups": 1}, "parallel": {"tensor_model_parallel_size": 2}}, ["model.num_query_groups = 1"]),
    ({"model": {"ffn_hidden_size": 97}, "parallel": {"tensor_model_parallel_size": 2}}, ["model.ffn_hidden_size = 97"]),
    (
        {
            "model": {"make_vocab_size_divisible_by": 1, "vocab_size": 1001},
            "parallel": {"tensor_model_parallel_size": 2},
        },
        ["model.padded_vocab_size = 1001"],
    ),
    (
        {
            "model": MOE | {"moe_shared_expert_intermediate_size": 7},
            "parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        },
        ["model.moe_shared_expert_intermediate_size = 7"],
    ),
    (
        {
            "model": MOE | {"moe_ffn_hidden_size": 9},
            "parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        },
        ["model.expert_ffn_hidden_size = 9", "parallel.etp = 2"],
    ),
    ({"model": MOE, "parallel": {"expert_model_parallel_size": 3}}, ["model.num_moe_experts = 8", "= 3"]),
    (
        {"parallel": {"pipeline_model_parallel_size": 3}},
        ["model.num_layers = 4", "parallel.pipeline_model_parallel_size = 3"],
    ),
    ({"parallel": {"virtual_pipeline_model_parallel_size": 2}}, ["pipeline_model_parallel_size > 1"]),
    ({"parallel": {"sequence_parallel": True}}, ["more than one process"]),
    ({"model": MOE, "parallel": {"tensor_model_parallel_size": 2}}, ["sequence_parallel: true"]),
    (
        {
            "model": MOE,
            "parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_tensor_parallel_size": 1},
        },
        ["reduces expert gradients over the wrong group"],
    ),
    (
        {"data": {"sequence_length": 63}, "parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}},
        ["data.sequence_length = 63"],
    ),
    ({"data": {"sequence_length": 8192}}, ["model.max_position_embeddings = 4096"]),
    ({"parallel": {"overlap_param_gather": True}}, ["parallel.overlap_grad_reduce = False"]),
    ({"train": {"micro_batch_size": 3}}, ["train.global_batch_size = 8", "train.micro_batch_size = 3"]),
    ({"train": {"eval_interval": 5}}, ["data.validation"]),
    ({"schedule": {"warmup_iters": 101}}, ["schedule.warmup_iters = 101", "train.train_iters = 100"]),
    ({"schedule": {"warmup_iters": 50, "decay_iters": 50}}, ["end after the warmup"]),
    ({"schedule": {"kind": "wsd", "warmup_iters": 60, "wsd_decay_iters": 60}}, ["longer than the run"]),
    ({"schedule": {"min_lr": 0.1}}, ["schedule.min_lr = 0.1", "optimizer.lr = 0.001"]),
    ({"schedule": {"kind": "wsd", "wsd_decay_iters": 5, "decay_style": "exponential"}}, ["set min_lr"]),
    ({"recompute": {"granularity": "full", "num_layers": 5}}, ["only 4 layers"]),
    ({"model": {"transformer_overrides": {"hidden_size": 3}}}, ["hidden_size: set through this file's own keys"]),
    (
        {"runtime": TE | {"device": "cpu"}},
        ["runtime.backend = 'transformer_engine'", "runtime.device = 'cpu'", "runtime.backend: torch"],
    ),
    (
        {"recompute": {"granularity": "selective", "modules": ["layernorm"]}},
        ["recompute.modules = ['layernorm']", "runtime.backend: transformer_engine only"],
    ),
    ({"runtime": TE, "recompute": {"granularity": "selective", "modules": ["moe_act"]}}, ["of routed experts"]),
    (
        {"runtime": TE, "precision": fp8("delayed", num_layers_at_start_in_bf16=1)},
        ["precision.recipe = 'delayed'", "precision.num_layers_at_start_in_bf16 = 1", "recipe: tensorwise"],
    ),
    (
        {
            "runtime": TE,
            "model": MOE,
            "precision": fp8("delayed"),
            "recompute": {"granularity": "selective", "modules": ["moe_act"]},
        },
        ["recompute.modules = ['moe_act']", "leave those modules out"],
    ),
    (
        {"runtime": TE, "precision": fp8("tensorwise", fp8_wgrad=False)},
        ["precision.fp8_wgrad = False", "in FP8 all the same"],
    ),
    (
        {
            "runtime": TE,
            "precision": fp8("tensorwise", num_layers_at_end_in_bf16=3),
            "parallel": {"pipeline_model_parallel_size": 2},
        },
        ["precision.num_layers_at_end_in_bf16 = 3", "one pipeline stage's layers (2)"],
    ),
    (
        {"runtime": TE, "precision": fp8("blockwise"), "model": {"ffn_hidden_size": 72}},
        ["model.ffn_hidden_size = 72", "multiples of 16, and this gives 72"],
    ),
    (
        {"runtime": TE, "precision": fp8("mxfp8"), "model": MOE | {"moe_ffn_hidden_size": 48}},
        ["model.expert_ffn_hidden_size = 48", "multiples of 32, and this gives 48"],
    ),
    (
        {"runtime": TE, "precision": fp8("mxfp8"), "model": MOE | {"moe_shared_expert_intermediate_size": 48}},
        ["model.moe_shared_expert_intermediate_size = 48", "multiples of 32"],
    ),
    ({"runtime": TE, "precision": fp8("tensorwise"), "model": {"hidden_size": 72}}, ["model.hidden_size = 72"]),
    (
        {"runtime": TE, "precision": fp8("tensorwise"), "model": {"num_query_groups": 1, "kv_channels": 20}},
        ["model.head_dim = 20", "multiples of 16"],
    ),
    ({"runtime": TE, "precision": fp8("tensorwise"), "data": {"sequence_length": 36}}, ["data.sequence_length = 36"]),
    (
        {
            "runtime": TE,
            "model": MOE | {"add_bias_linear": True},
            "parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        },
        ["model.add_bias_linear = True", "parallel.etp = 2", "expert_tensor_parallel_size: 1"],
    ),
]


@pytest.mark.parametrize(("sections", "expected"), VIOLATIONS, ids=[v[1][0][:40] for v in VIOLATIONS])
def test_violation_names_keys_values_and_the_way_out(sections: dict[str, dict[str, Any]], expected: list[str]) -> None:
    message = faults(mapping(**sections))
    for part in expected:
        assert part in message


def test_every_rule_can_be_violated() -> None:
    """No rule is dead: each complains about at least one of the violations above."""
    import megatron_ext.config.load as load_module

    complained: set[int] = set()
    real = load_module.violations

    def spy(values: dict[str, Any]) -> list[str]:
        complained.update(i for i, r in enumerate(RULES) if r.violation(values) is not None)
        return real(values)

    load_module.violations = spy  # type: ignore[assignment]
    try:
        for sections, _ in VIOLATIONS:
            faults(mapping(**sections))
    finally:
        load_module.violations = real
    # Of the rules that are written once for many keys, one violated example stands for all.
    dead = [
        r
        for i, r in enumerate(RULES)
        if i not in complained and r.check.__name__ not in ("_needs_experts", "_not_built")
    ]
    assert not dead, [r.keys for r in dead]


def test_legal_neighbours_pass() -> None:
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
