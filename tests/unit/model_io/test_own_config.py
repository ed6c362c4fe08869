"""The configuration class of our exports says yes to what a model can be, and names what is wrong with the rest."""

from typing import Any

import pytest

from megatron_ext.model_io.huggingface.modeling.configuration_megatron_ext import MegatronExtConfig

MOE = {"num_experts": 6, "num_experts_per_tok": 2, "num_hidden_layers": 3}
LATENT = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"norm_type": "batch"}, "norm_type = 'batch': expected one of 'rms_norm', 'layer_norm'"),
        ({"hidden_act": "relu"}, "hidden_act = 'relu': expected one of 'silu'"),
        ({"scoring_func": "tanh", **MOE}, "scoring_func = 'tanh'"),
        ({"qk_norm": "rows"}, "qk_norm = 'rows': expected one of None, 'head', 'projection'"),
        ({"num_attention_heads": 6, "num_key_value_heads": 4}, "6 is no multiple of num_key_value_heads = 4"),
        ({"qk_norm": "projection", "norm_type": "layer_norm"}, "qk_norm = 'projection' is an RMSNorm"),
        ({"head_dim": 5}, "RoPE rotates pairs, and 5 dimensions"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_type = 'longrope': expected one of default"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "needs original_max_position_embeddings"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 8}}, "rope_type linear has no beta_fast"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "rope_theta is 500000.0 and 10000.0 at once"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 5}},
            "dynamic RoPE is scaled beyond max_position_embeddings",
        ),
        ({"position_embedding_type": "learned", "partial_rotary_factor": 0.5}, "learned positions are not rotated"),
        ({"sliding_window": 0}, "sliding_window = 0: a query attends to itself at least"),
        ({"layer_types": ["sliding_attention"] * 32}, "layer_types has sliding_attention, which needs sliding_window"),
        ({"sliding_window": 4, "layer_types": ["full_attention"]}, "layer_types needs full_attention or sliding"),
        ({**LATENT, "sliding_window": 4}, "latent attention has no window"),
        ({**LATENT, "attention_sinks": True}, "latent attention has no sinks"),
        ({"v_head_dim": 8}, "latent attention needs kv_lora_rank"),
        ({"kv_lora_rank": 16}, "latent attention needs qk_nope_head_dim, qk_rope_head_dim, v_head_dim"),
        ({**LATENT, "qk_norm": "head"}, "latent attention has norms of its own"),
        ({**LATENT, "qkv_bias": True}, "latent attention has no biases"),
        ({**LATENT, "num_key_value_heads": 8}, "every head has keys and values of its own"),
        ({**LATENT, "head_dim": 16}, "head_dim = 16: with kv_lora_rank it is"),
        ({"gating_normalization": {}}, "gating_normalization = {} has no meaning without num_experts"),
        ({"moe_layer_pattern": [1] * 32}, "has no meaning without num_experts"),
        ({**MOE, "num_experts_per_tok": 7}, "num_experts_per_tok = 7 of num_experts = 6"),
        ({**MOE, "moe_layer_pattern": [1, 0]}, "moe_layer_pattern needs a 0 or a 1 for each of 3 layers"),
        ({**MOE, "norm_topk_prob": True}, "norm_topk_prob has no meaning after a softmax over the selected experts"),
        ({**MOE, "scoring_func": "sigmoid", "softmax_before_topk": True}, "no meaning with sigmoid scores"),
        ({**MOE, "n_group": 3}, "n_group and topk_group belong together"),
        ({**MOE, "n_group": 4, "topk_group": 2}, "n_group = 4 and topk_group = 2 do not fit"),
        ({**MOE, "shared_expert_gate": True}, "shared_expert_gate needs shared_expert_intermediate_size"),
        ({**MOE, "gating_normalization": {"scale": 1.0}}, "expected scale, eps and correction"),
        ({**MOE, "router_noise": {"kind": "pink"}}, "kind = 'pink': expected gumbel, learned, input_jitter"),
        ({**MOE, "router_noise": {"kind": "gumbel"}}, "expected kind and scale"),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match="this is no MegatronExtConfig") as caught:
        MegatronExtConfig(**fields)
    assert complaint in str(caught.value)


def test_all_faults_come_at_once() -> None:
    with pytest.raises(ValueError, match="(?s)norm_type.*hidden_act.*num_key_value_heads"):
        MegatronExtConfig(norm_type="x", hidden_act="y", num_key_value_heads=3)


def test_old_and_new_spellings_of_rope_mean_the_same() -> None:
    scaling = {"factor": 8.0, "original_max_position_embeddings": 64}
    new = MegatronExtConfig(
        rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, "partial_rotary_factor": 0.5, **scaling}
    )
    old = MegatronExtConfig(rope_theta=5e5, partial_rotary_factor=0.5, rope_scaling={"type": "llama3", **scaling})
    both = MegatronExtConfig(
        rope_theta=5e5,
        partial_rotary_factor=0.5,
        rope_parameters=new.rope_parameters,
        rope_scaling={"type": "llama3", "rope_type": "llama3", **scaling},
    )
    assert new.rope_parameters == old.rope_parameters == both.rope_parameters
    assert new.rotary_width == old.rotary_width == 64


def test_defaults_are_llamas() -> None:
    config = MegatronExtConfig()
    assert (config.num_experts, config.head_dim, config.rope_theta) == (0, 128, 10000.0)
    moe = MegatronExtConfig(**MOE)
    assert moe.moe_layer_pattern == [1, 1, 1]
    assert moe.moe_intermediate_size == moe.intermediate_size
    assert MegatronExtConfig(**MOE, scoring_func="sigmoid").norm_topk_prob is True


def test_a_configuration_comes_back_from_its_dictionary() -> None:
    for fields in ({}, MOE, LATENT, {**MOE, "scoring_func": "sigmoid"}, {"partial_rotary_factor": 0.25}):
        config = MegatronExtConfig(**fields)
        assert MegatronExtConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
