"""What rules of models and their precision refuse: sections of a run, and what the message says."""

from typing import Any

from tests.unit.config.parts_of_runs import LATENT, LLAMA3, MOE, PRE, TE, YARN, fp8

FILLED = {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True}

VIOLATIONS: list[tuple[dict[str, dict[str, Any]], list[str]]] = [
    ({"model": {"num_query_groups": 3}}, ["model.num_attention_heads = 4", "model.num_query_groups = 3"]),
    (
        {
            "model": {"num_layers": 2},
            "parallel": {
                "pipeline_model_parallel_size": 4,
                "account_for_embedding_in_pipeline_split": True,
                "account_for_loss_in_pipeline_split": True,
            },
        },
        ["model.num_layers = 2, parallel.pipeline_model_parallel_size = 4", "has no layer left"],
    ),
    ({"model": {"hidden_size": 66}}, ["model.hidden_size = 66", "kv_channels"]),
    ({"model": {"kv_channels": 7}}, ["model.rotary_width = 7", "model.head_dim = 7", "even"]),
    ({"model": {"rotary_percent": 0.2}}, ["model.rotary_width = 3", "model.rotary_percent = 0.2"]),
    (
        {"model": {"position_embedding_type": "learned_absolute", "rope_scaling": {"kind": "linear", "factor": 2.0}}},
        ["model.rope_scaling = {'kind': 'linear', 'factor': 2.0}", "only rotary embedding has that"],
    ),
    ({"model": {"position_embedding_type": "learned_absolute", "rotary_percent": 0.5}}, ["only rotary embedding"]),
    ({"model": {"position_embedding_type": "learned_absolute", "multi_latent_attention": LATENT}}, ["only rotary"]),
    (
        {"model": {"multi_latent_attention": LATENT, "num_query_groups": 2}},
        ["model.num_query_groups = 2", "with multi_latent_attention every head has keys and values of its own"],
    ),
    (
        {"model": {"multi_latent_attention": LATENT, "add_bias_linear": True, "qk_layernorm": "head"}},
        ["model.add_bias_linear = True: with multi_latent_attention", "model.qk_layernorm = 'head': with multi_latent"],
    ),
    (
        {"model": {"multi_latent_attention": LATENT, "sliding_window": 8, "attention_sinks": True}},
        ["model.sliding_window = 8: with multi_latent_attention", "model.attention_sinks = True: with multi_latent"],
    ),
    ({"model": {"window_attn_skip_freq": 2}}, ["model.window_attn_skip_freq = 2", "set sliding_window"]),
    (
        {"model": {"sliding_window": 8, "window_attn_skip_freq": [1, 0]}},
        ["model.window_attn_skip_freq = [1, 0], model.sliding_window = 8", "one entry a layer"],
    ),
    ({"model": {"attention_sinks": True, "attention_dropout": 0.1}}, ["model.attention_sinks = True", "dropout: 0"]),
    (
        {"runtime": TE, "model": {"sliding_window": 8}, "parallel": {"context_parallel_size": 2}},
        ["model.sliding_window = 8, model.attention_sinks = False, parallel.context_parallel_size = 2", "a ring"],
    ),
    (
        {"model": {"qk_layernorm": "projection", "normalization": "LayerNorm"}},
        ["model.qk_layernorm = 'projection', model.normalization = 'LayerNorm'", "set qk_layernorm: head"],
    ),
    (
        {"model": {"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}},
        ["model.rope_scaling.low_freq_factor = 4.0, model.rope_scaling.high_freq_factor = 4.0"],
    ),
    ({"model": {"rope_scaling": YARN | {"beta_slow": 40.0}}}, ["model.rope_scaling.beta_slow = 40.0", "beta_fast"]),
    (
        {"model": {"rope_scaling": {"kind": "dynamic", "factor": 2.0}, "rotary_percent": 0.125}},
        ["model.rotary_width = 2", "more than one pair"],
    ),
    (
        {
            "model": MOE | {"add_bias_linear": True, "hidden_size": 66, "kv_channels": 16},
            "parallel": {
                "tensor_model_parallel_size": 4,
                "sequence_parallel": True,
            },
        },
        ["model.hidden_size = 66, parallel.etp = 4", "output biases are split"],
    ),
    (
        {"model": {"activation_func_clamp_value": 7.0, "glu_linear_offset": 1.0, "gated_linear_unit": False}},
        ["model.activation_func_clamp_value = 7.0, model.gated_linear_unit = False", "model.glu_linear_offset = 1.0"],
    ),
    ({"model": MOE | {"moe_router_topk": 9}}, ["model.moe_router_topk = 9", "model.num_moe_experts = 8"]),
    ({"model": MOE | {"moe_router_topk": 1}}, ["moe_router_pre_softmax: true"]),
    ({"model": MOE | PRE | {"moe_router_topk": 1, "moe_router_norm_topk_prob": True}}, ["divided by itself"]),
    ({"model": MOE | {"moe_router_norm_topk_prob": False}}, ["sums to 1 already"]),
    ({"model": MOE | PRE | {"moe_router_score_function": "sigmoid"}}, ["no meaning with sigmoid"]),
    ({"model": MOE | {"moe_router_num_groups": 4}}, ["group-limited routing needs both"]),
    ({"model": MOE | {"moe_router_num_groups": 4, "moe_router_group_topk": 5}}, ["more groups than there are"]),
    ({"model": MOE | {"moe_router_num_groups": 3, "moe_router_group_topk": 2}}, ["a multiple of their groups"]),
    ({"model": MOE | {"moe_router_num_groups": 8, "moe_router_group_topk": 2}}, ["needs two experts"]),
    ({"model": MOE | {"moe_router_group_score": "max"}}, ["no meaning without groups"]),
    (
        {"model": MOE | {"moe_router_num_groups": 4, "moe_router_group_topk": 1, "moe_router_topk": 3}},
        ["fewer experts than each token is sent to"],
    ),
    ({"model": MOE | {"moe_router_bias_update_rate": 0.01}}, ["set moe_router_enable_expert_bias: true"]),
    ({"model": MOE | {"moe_token_drop_policy": "position"}}, ["no effect without a capacity"]),
    ({"model": MOE | {"moe_pad_expert_input_to_capacity": True}}, ["no capacity to fill up; set one"]),
    (
        {"model": MOE | FILLED, "parallel": {"expert_model_parallel_size": 2}},
        ["moe_pad_expert_input_to_capacity = True", "expert_model_parallel_size = 2", "without expert and tensor"],
    ),
    (
        {"model": MOE | FILLED, "parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}},
        ["moe_pad_expert_input_to_capacity = True", "tensor_model_parallel_size = 2", "without expert and tensor"],
    ),
    (
        {"model": MOE | FILLED, "runtime": {"backend": "transformer_engine"}},
        [
            "moe_pad_expert_input_to_capacity = True, runtime.backend = 'transformer_engine'",
            "megatron-core's dispatcher",
            "set backend: torch",
        ],
    ),
    ({"model": MOE | {"moe_shared_expert_gate": True}}, ["no shared expert to gate"]),
    ({"model": MOE | {"moe_aux_loss_coeff": [0.1]}}, ["needs a list of balance losses"]),
    (
        {"model": MOE | {"moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"], "moe_aux_loss_coeff": 0.1}},
        ["a list of as many coefficients"],
    ),
    (
        {"model": MOE | {"moe_router_load_balancing_type": ["aux_loss"] * 2, "moe_aux_loss_coeff": [0.1, 0.1]}},
        ["each balance loss at most once"],
    ),
    (
        {"model": MOE | {"moe_router_load_balancing_type": "none", "moe_adaptive_aux_loss": {}}},
        ["adapts the coefficient of one balance loss"],
    ),
    ({"model": MOE | {"moe_layer_freq": [1, 0]}}, ["model.moe_layer_freq = [1, 0]", "one a layer"]),
    ({"model": MOE | {"moe_layer_freq": 0}}, ["model.moe_layer_freq = 0: must be greater than or equal to 1"]),
    ({"model": MOE | {"moe_first_k_dense": 4}}, ["model.moe_first_k_dense = 4", "no layer is left"]),
    ({"model": MOE | {"moe_layer_freq": [0, 0, 0, 0]}}, ["no layer is left"]),
    ({"model": MOE | {"moe_first_k_dense": 1, "moe_layer_freq": 4}}, ["no layer is left"]),
    ({"model": {"moe_router_pre_softmax": True}}, ["no meaning in a dense model"]),
    (
        {"model": MOE | {"moe_router_load_balancing_type": "none", "moe_aux_loss_coeff": 0.1}},
        ["without a balance loss"],
    ),
    ({"model": {"moe_aux_loss_coeff": 0.1}}, ["model.moe_aux_loss_coeff = 0.1", "no meaning in a dense model"]),
    ({"model": {"moe_gating_normalization": {}}}, ["no meaning in a dense model"]),
    ({"model": {"moe_token_drop_policy": "position"}}, ["no meaning in a dense model"]),
    ({"model": {"moe_router_bias_update_rate": 0.1}}, ["no meaning in a dense model"]),
    ({"model": {"moe_router_group_score": "max"}}, ["no meaning in a dense model"]),
    ({"model": {"num_query_groups": 1}, "parallel": {"tensor_model_parallel_size": 2}}, ["model.num_query_groups = 1"]),
    (
        {
            "model": {"multi_latent_attention": LATENT | {"kv_lora_rank": 20}, "hidden_size": 64},
            "precision": {"kind": "fp8"},
            "runtime": TE,
        },
        ["model.multi_latent_attention", "FP8 kernels take multiples of 16, and this gives 20"],
    ),
    (
        {
            "model": {"multi_latent_attention": LATENT | {"kv_lora_rank": 20}, "hidden_size": 64},
            "precision": {"kind": "fp8"},
        },
        ["model.multi_latent_attention", "one rank would have 20"],
    ),
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
    ({"model": MOE, "parallel": {"tensor_model_parallel_size": 2}}, ["sequence_parallel: true"]),
    (
        {
            "model": MOE,
            "parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_tensor_parallel_size": 1},
        },
        ["reduces expert gradients over the wrong group"],
    ),
    (
        {"data": {"sequence_length": 8193}, "model": {"rope_scaling": {"kind": "dynamic", "factor": 2.0}}},
        ["data.sequence_length = 8193"],
    ),
    (
        {"recompute": {"logits": True}, "model": {"transformer_overrides": {"defer_embedding_wgrad_compute": True}}},
        ["recompute.logits = True", "needs the logits' gradient"],
    ),
    (
        {"precision": {"kind": "fp8", "margin": 1}},
        ["precision.margin = 1", "precision.recipe = 'tensorwise'", "delayed"],
    ),
    (
        {"precision": {"kind": "fp8", "num_layers_at_start_in_bf16": 2, "num_layers_at_end_in_bf16": 2}},
        ["precision.num_layers_at_start_in_bf16 = 2", "model.num_layers = 4", "no layer is left in fp8"],
    ),
    (
        {"precision": {"kind": "fp8", "recipe": "rowwise"}, "runtime": {"backend": "transformer_engine"}},
        ["precision.recipe = 'rowwise', runtime.backend = 'transformer_engine'", "runtime.backend: torch"],
    ),
    (
        {"precision": {"kind": "fp8", "recipe": "mxfp8"}, "runtime": {"device": "cuda"}},
        ["precision.recipe = 'mxfp8', runtime.device = 'cuda'", "runtime.backend: transformer_engine"],
    ),
    (
        {"precision": {"kind": "fp8"}, "model": {"ffn_hidden_size": 104}},
        ["model.ffn_hidden_size = 104, parallel.tensor_model_parallel_size = 1", "a multiple of 16", "device: cpu"],
    ),
    ({"precision": {"kind": "fp8"}, "model": {"hidden_size": 72}}, ["model.hidden_size = 72", "a multiple of 16"]),
    (
        {
            "precision": {"kind": "fp8"},
            "model": {"num_query_groups": 2, "kv_channels": 10},
            "parallel": {"tensor_model_parallel_size": 2},
        },
        ["model.num_attention_heads = 4, model.num_query_groups = 2, model.head_dim = 10", "one rank would have 20"],
    ),
    (
        {"precision": {"kind": "fp8"}, "data": {"sequence_length": 63}},
        ["data.sequence_length = 63, train.micro_batch_size = 1", "precision.fp8_wgrad: false"],
    ),
    ({"model": {"transformer_overrides": {"hidden_size": 3}}}, ["hidden_size: set through this file's own keys"]),
    ({"model": {"transformer_overrides": {"rotary_base": 3.0}}}, ["rotary_base: set through this file's own keys"]),
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
        {"runtime": TE, "precision": fp8("tensorwise", keep_fp8_weights=False)},
        ["precision.keep_fp8_weights = False", "by rules of its own"],
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
