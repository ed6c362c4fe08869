"""Every rule between keys: what it refuses, with both keys and both values, and what it lets pass."""

import os
from typing import Any

import pytest

from megatron_ext.config.rules import RULES
from tests.unit.config.test_load import faults, load, mapping

MOE = {"num_moe_experts": 8}
LATENT = {"kv_lora_rank": 8, "qk_head_dim": 8, "qk_pos_emb_head_dim": 4, "v_head_dim": 8}
LLAMA3 = {"kind": "llama3", "factor": 8.0, "original_max_position_embeddings": 1024}
YARN = {"kind": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
PRE = {"moe_router_pre_softmax": True}
TE = {"backend": "transformer_engine"}


def fp8(recipe: str, **fields: Any) -> dict[str, Any]:
    return {"kind": "fp8", "recipe": recipe, **fields}


STAGED = {"train": [], "cache_dir": None, "sources": {"ja": {"path": "a"}, "en": {"path": "b"}}}
ONE_STAGE = {**STAGED, "stages": [{"name": "all", "mix": {"ja": 1}, "steps": 2}]}

ADAPTED: dict[str, dict[str, Any]] = {"adapters": {}, "checkpoint": {"initialize_from": "base"}}
EVERYTHING = {"targets": [{"match": ["*"]}]}

MAIL = {"host": "smtp.example.org", "sender": "training@example.org", "recipients": ["team@example.org"]}

VIOLATIONS: list[tuple[dict[str, dict[str, Any]], list[str]]] = [
    ({"alerts": {"wandb": True}}, ["alerts.wandb = True, logging.wandb.mode = 'off': there is no W&B run to alert by"]),
    (
        {"alerts": {"email": {**MAIL, "username": "us"}}},
        ["alerts.email.password_variable = None: set both, or neither"],
    ),
    (
        {"alerts": {"email": {**MAIL, "username": "us", "password_variable": "SECRET", "security": "none"}}},
        ["alerts.email.username = 'us', alerts.email.security = 'none': the password would travel in clear"],
    ),
    ({"adapters": {}}, ["checkpoint.initialize_from = None: adapters are trained beside the weights of a base model"]),
    (
        {**ADAPTED, "adapters": {"targets": [{"match": ["experts.*", "q"]}]}},
        ["adapters.targets.0.match: 'experts.*' matches no projection of the model; it has"],
    ),
    (
        {**ADAPTED, "model": MOE, "parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}},
        ["parallel.expert_tensor_parallel_size = 2: adapters of routed experts are not split; set it to 1"],
    ),
    (
        {**ADAPTED, "adapters": EVERYTHING, "model": {"untie_embeddings_and_output_weights": False}},
        ["adapters.targets: matches embedding.word_embeddings, which is one matrix with the other end of the model"],
    ),
    (
        {**ADAPTED, "runtime": TE},
        ["runtime.backend = 'transformer_engine': adapters are computed by the torch backend"],
    ),
    (
        {**ADAPTED, "model": {**MOE, "transformer_overrides": {"moe_shared_expert_overlap": True}}},
        ["overlapped shared experts communicate outside their linear layers, past their adapters"],
    ),
    ({"data": {"train": []}}, ["data.train: is required, or data.sources with data.stages"]),
    ({"data": {**ONE_STAGE, "train": [{"path": "a"}]}}, ["data.train: one blend for the whole run"]),
    ({"data": {**ONE_STAGE, "cache_dir": "c"}}, ["data.cache_dir = 'c'", "computed, not kept"]),
    (
        {"data": {"pack_documents": True, "cache_dir": "c", "unit_tokens": 64}},
        ["data.pack_documents = true, data.cache_dir = 'c'", "data.pack_documents = true, data.unit_tokens = 64"],
    ),
    (
        {
            "data": {
                **STAGED,
                "pack_documents": True,
                "stages": [
                    {"name": "A", "mix": {"ja": 1}, "steps": 2},
                    {"name": "B", "mix": {"ja": 1}, "steps": 2, "sequence_length": 32},
                ],
            }
        },
        ["the stages have the sequence lengths 32, 64; packs are of one"],
    ),
    (
        {"train": {"exit_at": {"time": "tomorrow"}}},
        ["train.exit_at.time = 'tomorrow': is no time; write 2026-12-01T09:00 or"],
    ),
    (
        {"task": {"kind": "sft"}, "data": {**ONE_STAGE, "eod_mask_loss": True, "pack_documents": True}},
        ["data.eod_mask_loss = true: is of documents of text", "data.pack_documents = true: is of documents of text"],
    ),
    (
        {"task": {"kind": "sft"}, "data": {"cache_dir": "c"}},
        ["data.cache_dir = 'c': megatron-core's order is of texts"],
    ),
    (
        {
            "task": {"kind": "sft"},
            "data": {
                **STAGED,
                "unit_tokens": 64,
                "stages": [
                    {"name": "A", "mix": {"ja": 1}, "steps": 2},
                    {"name": "B", "mix": {"ja": 1}, "steps": 2, "sequence_length": 32},
                ],
            },
        },
        ["lengths 32, 64; packs of conversations are of one", "data.unit_tokens = 64: a pack is a unit"],
    ),
    (
        {"task": {"kind": "sft"}, "runtime": TE, "data": ONE_STAGE},
        ["attention would not keep packed samples apart; set runtime.backend: torch"],
    ),
    ({"train": {"train_iters": 0}}, ["train.train_iters = 0: must be greater than or equal to 1"]),
    ({"data": {"train": [{"path": "a"}, {"path": "a"}], "cache_dir": None}}, ["data.train: 'a' is there twice"]),
    (
        {
            "data": {
                **STAGED,
                "stages": [
                    {"name": "A", "mix": {"ja": 1.0, "hi": 0.0}, "steps": 3, "tokens": 9},
                    {"name": "A", "take": {"ja": {"epochs": 1, "tokens": 5}}, "samples": 8},
                    {"name": "C"},
                    {"name": "D", "mix": {"en": 1}, "steps": 4, "global_batch_size": 7, "micro_batch_size": 2},
                ],
            },
        },
        [
            "data.stages.0.mix.hi = 0.0: must be greater than 0",
            "data.stages.0.tokens: exactly one of tokens, steps and samples",
            "data.stages.1.name = 'A': an earlier stage has this name",
            "data.stages.1.samples: take says how long the stage is",
            "data.stages.1.take.ja: exactly one of epochs, tokens and samples, not ['epochs', 'tokens']",
            "data.stages.2.mix: exactly one of mix and take says what is read",
            "data.stages.3 (D): train.global_batch_size = 7, train.micro_batch_size = 2",
        ],
    ),
    ({"model": {"num_query_groups": 3}}, ["model.num_attention_heads = 4", "model.num_query_groups = 3"]),
    (
        {"checkpoint": {"keep_every": 5}},
        ["checkpoint.keep_every = 5, checkpoint.keep_last = None", "set it, such as 3"],
    ),
    (
        {"checkpoint": {"keep_every": 5, "keep_last": 2, "save_interval": 2}},
        ["checkpoint.keep_every = 5, checkpoint.save_interval = 2", "must be a multiple of it"],
    ),
    ({"checkpoint": {"keep_matching": "5"}}, ["checkpoint.keep_matching = '5', checkpoint.keep_last = None"]),
    ({"checkpoint": {"copy_to": "d/"}}, ["checkpoint.copy_to = 'd/', checkpoint.directory = 'd'", "both are one"]),
    ({"checkpoint": {"copy_to": "./x/../d"}}, ["checkpoint.copy_to = './x/../d'", "both are one"]),
    ({"checkpoint": {"copy_to": "d", "directory": os.path.abspath("d")}}, ["checkpoint.copy_to = 'd'", "both are one"]),
    ({"checkpoint": {"copy_to": "file:///d", "directory": "/d"}}, ["checkpoint.copy_to = 'file:///d'", "both are"]),
    ({"checkpoint": {"keep_last": 2, "keep_matching": "(5"}}, ["checkpoint.keep_matching = '(5'", "no regular expre"]),
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
    ({"train": {"skip_steps": [[3, 2]]}}, ["train.skip_steps = [[3, 2]]", "[3, 2] is no range [first, last]"]),
    ({"train": {"skip_steps": [[1, 2, 3]]}}, ["[1, 2, 3] is no range [first, last]"]),
    (
        {"train": {"skip_samples": [[-1, 3]]}},
        ["train.skip_samples = [[-1, 3]]", "[-1, 3] is no range [first, last] of"],
    ),
    (
        {"guard": {"spikes": {"window": 16}}},
        ["guard.spikes.window = 16, guard.spikes.min_steps = 64", "lower"],
    ),
    ({"guard": {"rollback": {}}}, ["checkpoint.save_interval = None", "no checkpoint to go back to"]),
    (
        {"guard": {"rollback": {}}, "checkpoint": {"directory": "r", "save_interval": 50, "keep_last": 3}},
        ["guard.rollback.min_steps_back = 100", "set checkpoint.keep_last = 4 or more, or checkpoint.keep_every"],
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
        {
            "model": MOE
            | {
                "add_bias_linear": True,
                "moe_shared_expert_intermediate_size": 8,
                "transformer_overrides": {"moe_shared_expert_overlap": True},
            }
        },
        ["model.add_bias_linear = True", "remove moe_shared_expert_overlap"],
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
    ({"model": {"moe_token_drop_policy": "position"}}, ["no meaning in a dense model"]),
    ({"model": {"moe_router_bias_update_rate": 0.1}}, ["no meaning in a dense model"]),
    ({"model": {"moe_router_group_score": "max"}}, ["no meaning in a dense model"]),
    ({"parallel": {"expert_model_parallel_size": 2}}, ["no meaning in a dense model"]),
    (
        {"parallel": {"tensor_model_parallel_size": 3}},
        ["model.num_attention_heads = 4", "parallel.tensor_model_parallel_size = 3"],
    ),
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
        ["data.sequence_length = 63", "parallel.tensor_model_parallel_size = 2", "multiple of 2"],
    ),
    (
        {"data": {"sequence_length": 62}, "parallel": {"context_parallel_size": 2}},
        ["data.sequence_length = 62", "parallel.context_parallel_size = 2", "multiple of 4", "two equal slices"],
    ),
    (
        {"data": {"reset_attention_mask": True}, "runtime": {"backend": "transformer_engine"}},
        ["data.reset_attention_mask = True", "runtime.backend = 'transformer_engine'", "set runtime.backend: torch"],
    ),
    (
        {"data": {"reset_position_ids": True}},
        ["data.reset_position_ids = True", "set data.reset_attention_mask: true"],
    ),
    ({"data": {"sequence_length": 8192}}, ["model.max_position_embeddings = 4096"]),
    (
        {"data": {"sequence_length": 8193}, "model": {"rope_scaling": {"kind": "dynamic", "factor": 2.0}}},
        ["data.sequence_length = 8193"],
    ),
    ({"parallel": {"overlap_param_gather": True}}, ["parallel.overlap_grad_reduce = False"]),
    ({"train": {"micro_batch_size": 3}}, ["train.global_batch_size = 8", "train.micro_batch_size = 3"]),
    ({"train": {"eval_interval": 5}}, ["data.validation"]),
    ({"schedule": {"warmup_iters": 101}}, ["schedule.warmup_iters = 101", "train.train_iters = 100"]),
    ({"schedule": {"warmup_iters": 50, "decay_iters": 50}}, ["end after the warmup"]),
    ({"schedule": {"kind": "wsd", "warmup_iters": 60, "wsd_decay_iters": 60}}, ["longer than the run"]),
    (
        {"schedule": {"warmup_tokens": 1e9, "decay_tokens": 5e8}},
        ["schedule.warmup_tokens = 1000000000, schedule.decay_tokens = 500000000: the decay must end after the warmup"],
    ),
    (
        {"schedule": {"warmup_iters": 5, "warmup_tokens": 9, "warmup": {"stage": "a"}}},
        [
            "schedule.warmup_iters = 5, schedule.warmup_tokens = 9: both say it; keep one of them",
            "schedule.warmup_iters = 5, schedule.warmup.stage = 'a': both say it",
            "schedule.warmup_tokens = 9, schedule.warmup.stage = 'a': both say it",
            "schedule.warmup.stage = 'a': is no stage of this schedule: there are no data.stages",
        ],
    ),
    (
        {"schedule": {"decay_iters": 5, "decay_tokens": 9, "decay": {"stage": "a"}}},
        ["schedule.decay_iters = 5, schedule.decay_tokens = 9: both say it"],
    ),
    (
        {"schedule": {"kind": "wsd", "wsd_decay_iters": 5, "wsd_decay_tokens": 9, "decay": {"stage": "a"}}},
        ["schedule.wsd_decay_iters = 5, schedule.decay.stage = 'a': both say it"],
    ),
    (
        {"data": ONE_STAGE, "schedule": {"warmup": {"stage": "all"}, "decay": {"stage": "all"}}},
        ["schedule.warmup.stage = 'all', schedule.decay.stage = 'all': the decay must end after the warmup"],
    ),
    (
        {
            "data": {
                **STAGED,
                "stages": [
                    {"name": "a", "mix": {"ja": 1}, "steps": 2, "global_batch_size": 7, "sequence_length": 6},
                    {"name": "b", "mix": {"ja": 1}, "steps": 2},
                    {
                        "name": "c",
                        "mix": {"ja": 1},
                        "steps": 2,
                        "schedule": {"kind": "linear", "min_lr": 1.0, "decay": {"stage": "b"}},
                    },
                ],
            },
            "train": {"micro_batch_size": 2},
            "parallel": {"context_parallel_size": 2},
            "schedule": {"kind": "wsd", "warmup": {"stage": "b"}, "decay": {"stage": "c"}},
        },
        [
            "data.stages.0 (a): train.global_batch_size = 7, train.micro_batch_size = 2: the global batch must be",
            "data.stages.0 (a): data.sequence_length = 6, parallel.tensor_model_parallel_size = 1",
            "schedule.warmup.stage = 'b': is no stage of this schedule: it covers a, b; a warmup is the first",
            "schedule.decay.stage = 'c': is no stage of this schedule: it covers a, b",
            "data.stages.2 (c): schedule.min_lr = 1.0, optimizer.lr = 0.001: the final learning rate is above",
            "data.stages.2.schedule.decay.stage = 'b': is no stage of this schedule: it covers c",
        ],
    ),
    (
        {"train": {"batch_size_ramp": [{"global_batch_size": 3, "samples": 4}, {"global_batch_size": 4}]}},
        ["entry 0: samples = 4 is not a multiple of global_batch_size = 3"],
    ),
    (
        {"train": {"micro_batch_size": 2, "batch_size_ramp": [{"global_batch_size": 3, "steps": 4}]}},
        [
            "train.batch_size_ramp = [{'global_batch_size': 3, 'steps': 4}]",
            "global batches of [3] are no multiples of the micro-batch",
        ],
    ),
    ({"schedule": {"min_lr": 0.1}}, ["schedule.min_lr = 0.1", "optimizer.lr = 0.001"]),
    ({"schedule": {"kind": "wsd", "wsd_decay_iters": 5, "decay_style": "geometric"}}, ["set min_lr"]),
    (
        {"schedule": {"kind": "wsd", "wsd_decay_iters": 5, "decay_style": "exponential", "min_lr": 1e-5}},
        ["schedule.decay_style = 'exponential': geometric is what this name meant here", "set one of them"],
    ),
    ({"recompute": {"granularity": "full", "num_layers": 5}}, ["only 4 layers"]),
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
