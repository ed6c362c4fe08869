"""Configurations as their authors published them: old names of fields, and the parameters that they count."""

import math
from dataclasses import replace
from typing import Any

import pytest

from megatron_ext.canonical.catalogue import model_shapes
from tests.unit.architectures.reading import read, reference


def test_published_configurations_are_understood() -> None:
    """GPT-NeoX's own names of rotary embedding, DeepSeek's own of yarn: as in files of transformers 4."""
    old = reference("GPTNeoXForCausalLM")
    rope = old.pop("rope_parameters")
    old |= {"rotary_pct": rope["partial_rotary_factor"], "rotary_emb_base": rope["rope_theta"]}
    assert read("GPTNeoXForCausalLM", old) == read("GPTNeoXForCausalLM", reference("GPTNeoXForCausalLM"))
    old = reference("DeepseekV2ForCausalLM")
    rope = dict(old.pop("rope_parameters"))
    old |= {"rope_theta": rope.pop("rope_theta"), "scoring_func": "softmax", "aux_loss_alpha": 0.001, "ep_size": 1}
    old |= {"rope_scaling": {"type": rope.pop("rope_type"), **rope}, "seq_aux": True, "moe_layer_freq": 1}
    balance = {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.001}
    expected = replace(read("DeepseekV2ForCausalLM", reference("DeepseekV2ForCausalLM")), **balance)
    assert read("DeepseekV2ForCausalLM", old) == expected


PUBLISHED: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": {
        "activation_function": "gelu_new",
        "attn_pdrop": 0.1,
        "bos_token_id": 50256,
        "embd_pdrop": 0.1,
        "eos_token_id": 50256,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2",
        "n_ctx": 1024,
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "n_positions": 1024,
        "resid_pdrop": 0.1,
        "summary_activation": None,
        "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True,
        "summary_type": "cls_index",
        "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        "vocab_size": 50257,
    },
    "Qwen3MoeForCausalLM": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "output_router_logits": False,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "DeepseekV2ForCausalLM": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"},
        "aux_loss_alpha": 0.001,
        "first_k_dense_replace": 1,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 10944,
        "kv_lora_rank": 512,
        "max_position_embeddings": 163840,
        "model_type": "deepseek_v2",
        "moe_intermediate_size": 1408,
        "moe_layer_freq": 1,
        "n_group": 1,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "norm_topk_prob": False,
        "num_attention_heads": 16,
        "num_experts_per_tok": 6,
        "num_hidden_layers": 27,
        "num_key_value_heads": 16,
        "pretraining_tp": 1,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 1.0,
        "scoring_func": "softmax",
        "seq_aux": True,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "topk_method": "greedy",
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "v_head_dim": 128,
        "vocab_size": 102400,
    },
}


"""The fields of GPT-2, Qwen3-30B-A3B and DeepSeek-V2-Lite as their authors published them."""


PARAMETERS = {
    "GPT2LMHeadModel": 124_439_808,
    "Qwen3MoeForCausalLM": 30_532_122_624,
    "DeepseekV2ForCausalLM": 15_706_484_224,
}


@pytest.mark.parametrize("hf_class", PUBLISHED)
def test_models_have_the_parameters_that_their_authors_count(hf_class: str) -> None:
    model = replace(read(hf_class, PUBLISHED[hf_class]), make_vocab_size_divisible_by=1)
    assert sum(math.prod(shape) for shape in model_shapes(model).values()) == PARAMETERS[hf_class]
