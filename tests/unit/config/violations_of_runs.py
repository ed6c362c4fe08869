"""What rules of data, layouts, schedules and all else refuse: sections of a run, and what the message says."""

import os
from typing import Any

from tests.unit.config.parts_of_runs import ADAPTED, EVERYTHING, MAIL, MOE, ONE_STAGE, STAGED, TE

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
        {**ADAPTED, "adapters": {"targets": [{"match": ["layers.*"]}, {"match": ["q", "v"], "rank": 4}]}},
        ["adapters.targets.1: all it matches (q, v) goes to targets before it, of which the first counts"],
    ),
    (
        {**ADAPTED, "model": MOE, "parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True}},
        ["parallel.expert_tensor_parallel_size = 2: adapters of routed experts are not split; set it to 1"],
    ),
    (
        {**ADAPTED, "adapters": EVERYTHING, "recompute": {"logits": True}},
        ["recompute.logits = True: adapters.targets: matches output_layer, whose adapter adds to all logits"],
    ),
    (
        {**ADAPTED, "adapters": EVERYTHING, "model": {"untie_embeddings_and_output_weights": False}},
        ["adapters.targets: matches embedding.word_embeddings, which is one matrix with the other end of the model"],
    ),
    (
        {**ADAPTED, "runtime": TE},
        ["runtime.backend = 'transformer_engine': adapters are computed by the torch backend"],
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
        {"data": {**ONE_STAGE, "validation": [{"path": "a", "id": "v"}, {"path": "b", "id": "v"}]}},
        ["data.validation: 'v' is there twice"],
    ),
    (
        {
            "model": {"position_embedding_type": "learned_absolute"},
            "data": {
                **STAGED,
                "sources": {"ja": {"path": "a"}, "a\nb": {"path": "b"}, "": {"path": "c"}},
                "stages": [{"name": "A", "mix": {"ja": 1}, "steps": 2, "rotary_base": 1e6}],
            },
        },
        [
            "data.sources: the id 'a\\nb' cannot be shown",
            "data.sources: the id '' cannot be shown",
            "data.stages.0.rotary_base = 1e+06, model.position_embedding_type = 'learned_absolute': learned positions",
        ],
    ),
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
    ({"recompute": {"modules": ["mlp"]}}, ["has no effect; set granularity: selective"]),
    ({"recompute": {"granularity": "full", "modules": ["mlp"]}}, ["set granularity: selective"]),
    ({"recompute": {"granularity": "selective", "modules": []}}, ["nothing would be recomputed"]),
    (
        {"recompute": {"granularity": "selective", "modules": ["moe", "shared_experts"]}},
        ["the model has none of these", "it has core_attn, layernorm, mlp"],
    ),
    (
        {"recompute": {"granularity": "selective", "modules": ["core_attn", "shared_experts"]}},
        [
            "recompute.modules = ['core_attn', 'shared_experts']",
            "the model has no shared_experts; leave it out: it has",
        ],
    ),
    ({"recompute": {"num_layers": 2}}, ["have no effect; set granularity: full"]),
    ({"recompute": {"offload_layers": 5}}, ["recompute.offload_layers = 5", "only 4 layers"]),
    (
        {"recompute": {"granularity": "full", "offload_layers": 2}},
        ["recompute.offload_layers = 2, recompute.granularity = 'full'", "keep their input alone"],
    ),
    (
        {"recompute": {"offload_layers": 2}, "runtime": {"device": "cpu"}},
        ["recompute.offload_layers = 2", "a CPU computes in its own memory"],
    ),
    (
        {
            "recompute": {"offload_layers": 2},
            "model": {"transformer_overrides": {"cuda_graph_impl": "local", "cuda_graph_warmup_steps": 2}},
        },
        ["recompute.offload_layers = 2", "remove cuda_graph_impl, cuda_graph_warmup_steps"],
    ),
    (
        {"recompute": {"offload_min_bytes": 1024}},
        ["recompute.offload_min_bytes = 1024", "has no effect; set offload_layers"],
    ),
    (
        {"recompute": {"offload_layers": 2}, "runtime": TE},
        ["runtime.backend = 'transformer_engine'", "set cpu_offloading in model.transformer_overrides instead"],
    ),
    (
        {
            "recompute": {"offload_layers": 2},
            "runtime": TE,
            "model": {"transformer_overrides": {"cpu_offloading": True, "cpu_offloading_num_layers": 1}},
        },
        ["recompute.offload_layers = 2", "both move activations"],
    ),
    ({"parallel": {"expert_model_parallel_size": 2}}, ["no meaning in a dense model"]),
    (
        {"parallel": {"tensor_model_parallel_size": 3}},
        ["model.num_attention_heads = 4", "parallel.tensor_model_parallel_size = 3"],
    ),
    (
        {"parallel": {"pipeline_model_parallel_size": 3}},
        ["model.num_layers = 4", "parallel.pipeline_model_parallel_size = 3"],
    ),
    ({"parallel": {"virtual_pipeline_model_parallel_size": 2}}, ["pipeline_model_parallel_size > 1"]),
    ({"parallel": {"sequence_parallel": True}}, ["more than one process"]),
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
        {"parallel": {"overlap_param_gather": True, "overlap_grad_reduce": False}},
        ["parallel.overlap_grad_reduce = False", "needs both other options"],
    ),
    (
        {"model": {"transformer_overrides": {"cpu_offloading": True, "cpu_offloading_num_layers": 1}}},
        ["runtime.backend = 'torch'", "cpu_offloading moves what Transformer Engine's layers keep"],
    ),
    (
        {"optimizer": {"exp_avg_sq_dtype": "bf16", "adam_beta2": 0.999}},
        ["optimizer.adam_beta2 = 0.999", "less than 1/256 a step stands still"],
    ),
    (
        {"optimizer": {"exp_avg_dtype": "bf16", "adam_beta1": 0.997}},
        ["optimizer.exp_avg_dtype = 'bf16'", "optimizer.adam_beta1 = 0.997"],
    ),
    (
        {"optimizer": {"moments_on_host": True}, "runtime": {"device": "cpu"}},
        ["optimizer.moments_on_host = True", "a CPU computes in its own memory"],
    ),
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
    ({"task": {"kind": "preference", "loss": "ipo"}}, ["task.loss = 'ipo', task.log_probs = None", "say sum or mean"]),
    (
        {"task": {"kind": "preference", "loss": "orpo", "log_probs": "sum", "nll": 1.0, "reference": "file"}},
        ["orpo compares mean log-probabilities", "leave task.nll out", "orpo compares with no reference"],
    ),
    (
        {"task": {"kind": "preference", "loss": "hinge", "label_smoothing": 0.1, "gamma": 1.0}},
        ["hinge has no label smoothing", "hinge aims at no margin; leave task.gamma out"],
    ),
    ({"task": {"kind": "preference", "loss": "simpo"}}, ["set task.gamma, about half of task.beta"]),
    ({"task": {"kind": "preference", "beta": 1e30}}, ["task.beta = 1e+30: above 100 a difference of one nat"]),
    ({"task": {"kind": "preference", "beta": 1e-9}}, ["task.beta = 1e-09: below 1e-06 gradients drown"]),
    (
        {"task": {"kind": "preference", "loss": "simpo", "gamma": 1e9}},
        ["task.gamma = 1000000000.0, task.beta = 0.1: above 100 no pair ever reaches the margin"],
    ),
    ({"task": {"kind": "preference", "loss": "robust"}}, ["without label_smoothing robust is sigmoid"]),
    (
        {"task": {"kind": "preference", "reference": "adapters_off"}, "model": {"output_z_loss_coeff": 1e-4}},
        ["without adapters there is no base", "model.output_z_loss_coeff = 0.0001: is a loss of every token"],
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
        {"runtime": TE | {"device": "cpu"}},
        ["runtime.backend = 'transformer_engine'", "runtime.device = 'cpu'", "runtime.backend: torch"],
    ),
    (
        {"runtime": {"backend": "transformer_engine", "kernels": "triton"}},
        ["runtime.kernels = 'triton'", "runtime.backend = 'transformer_engine'", "remove runtime.kernels"],
    ),
    (
        {"runtime": {"compile_router": True}},
        ["runtime.compile_router = True, model.num_moe_experts = None: has no meaning"],
    ),
    (
        {"recompute": {"granularity": "selective", "modules": ["moe_act"]}},
        ["recompute.modules = ['moe_act']", "runtime.backend: transformer_engine only"],
    ),
    ({"runtime": TE, "recompute": {"granularity": "selective", "modules": ["moe_act"]}}, ["of routed experts"]),
]
