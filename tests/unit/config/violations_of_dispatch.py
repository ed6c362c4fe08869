"""What rules of the way of tokens to their experts refuse: sections of a run, and what the message says."""

from typing import Any

from tests.unit.config.parts_of_runs import ADAPTED, MOE

FLEX = {"moe_token_dispatcher_type": "flex", "expert_model_parallel_size": 2}
SENT = {"model": MOE, "precision": {"kind": "bf16"}}
OVERLAPPED = {"moe_shared_expert_overlap": True, "expert_model_parallel_size": 2}
SHARED = MOE | {"moe_shared_expert_intermediate_size": 8}

VIOLATIONS: list[tuple[dict[str, dict[str, Any]], list[str]]] = [
    (
        {**SENT, "parallel": FLEX, "runtime": {"device": "cpu"}},
        ["runtime.device = 'cpu'", "send between GPUs; set parallel.moe_token_dispatcher_type: alltoall"],
    ),
    ({**SENT, "parallel": FLEX, "precision": {"kind": "fp32"}}, ["precision.kind = 'fp32'", "send bf16; set parallel"]),
    ({**SENT, "parallel": FLEX, "runtime": {"deterministic": True}}, ["runtime.deterministic = True", "which order"]),
    (
        {**SENT, "parallel": FLEX | {"expert_model_parallel_size": 1}},
        ["parallel.expert_model_parallel_size = 1", "nothing is sent"],
    ),
    (
        {**SENT, "model": {"num_moe_experts": 6}, "parallel": FLEX | {"expert_model_parallel_size": 6}},
        ["DeepEP sends within groups of 2, 4, 8,", "this gives 6; set parallel.moe_token_dispatcher_type: alltoall"],
    ),
    ({**SENT, "model": MOE | {"hidden_size": 68}, "parallel": FLEX}, ["model.hidden_size = 68", "16 bytes at a time"]),
    (
        {"model": MOE, "parallel": {"moe_flex_dispatcher_backend": "deepep"}},
        ["parallel.moe_token_dispatcher_type = 'alltoall'", "no library sends; set moe_token_dispatcher_type: flex"],
    ),
    (
        {"model": SHARED, "parallel": OVERLAPPED | {"expert_model_parallel_size": 1}},
        ["parallel.expert_model_parallel_size = 1", "tokens that alltoall sends to other ranks; remove it"],
    ),
    ({"model": MOE, "parallel": OVERLAPPED}, ["model.moe_shared_expert_intermediate_size = None"]),
    (
        {"model": SHARED | {"add_bias_linear": True}, "parallel": OVERLAPPED},
        ["model.add_bias_linear = True", "remove moe_shared_expert_overlap"],
    ),
    (
        {
            "model": SHARED | {"activation_func_clamp_value": 7.0, "glu_linear_offset": 1.0},
            "parallel": OVERLAPPED,
        },
        ["model.activation_func_clamp_value = 7.0", "model.glu_linear_offset = 1.0", "remove moe_shared_expert_over"],
    ),
    (
        {"model": SHARED | {"moe_shared_expert_gate": True}, "parallel": OVERLAPPED},
        ["model.moe_shared_expert_gate = True", "where nothing waits for it"],
    ),
    (
        {
            "model": SHARED,
            "parallel": OVERLAPPED,
            "recompute": {"granularity": "selective", "modules": ["shared_experts"]},
        },
        ["recompute.modules = ['shared_experts']", "leave shared_experts out"],
    ),
    (
        {
            "model": SHARED,
            "parallel": OVERLAPPED,
            "recompute": {"offload_layers": 2},
        },
        ["recompute.offload_layers = 2, parallel.moe_shared_expert_overlap = True", "a stream of their own"],
    ),
    (
        {**ADAPTED, "model": SHARED, "parallel": OVERLAPPED},
        ["overlapped shared experts communicate outside their linear layers, past their adapters"],
    ),
]
