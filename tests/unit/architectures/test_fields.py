"""Config tables in both directions, and the refusal of what they cannot say."""

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig
from transformers.activations import ACT2FN

from megatron_ext.architectures.llama import LLAMA
from megatron_ext.architectures.registry import architecture_for, architecture_of
from megatron_ext.architectures.tables.attention_fields import SPELLINGS
from megatron_ext.architectures.tables.fields import config_to_hf, config_to_megatron, left_behind
from megatron_ext.architectures.tables.window_fields import FULL, SLIDING
from megatron_ext.config import ModelConfig, YarnRopeScaling
from megatron_ext.errors import ConversionError
from megatron_ext.mcore.activation import quick_gelu
from megatron_ext.mcore.moe import balance
from megatron_ext.testing.tiny import tiny_model
from tests.unit.architectures.reading import read, reference
from tests.unit.model_io.references import LLAMA3, REFERENCES, Sizes


def same_model(a: ModelConfig, b: ModelConfig) -> bool:
    fields = (
        "num_layers hidden_size ffn_hidden_size num_attention_heads query_groups head_dim vocab_size rotary_base "
        "layernorm_epsilon untie_embeddings_and_output_weights max_position_embeddings num_moe_experts "
        "expert_ffn_hidden_size moe_router_topk moe_router_pre_softmax moe_router_topk_scaling_factor "
        "moe_gating_normalization moe_shared_expert_intermediate_size moe_layer_pattern"
    ).split()
    return all(getattr(a, name) == getattr(b, name) for name in fields)


@pytest.mark.parametrize(
    "model",
    [
        tiny_model(),
        tiny_model(untie_embeddings_and_output_weights=False, rotary_base=5e5, kv_channels=24),
        tiny_model(moe=True),
        tiny_model(
            moe=True, moe_router_pre_softmax=True, moe_router_topk_scaling_factor=2.5, moe_gating_normalization=None
        ),
    ],
)
def test_our_fields_survive_the_way_there_and_back(model: ModelConfig) -> None:
    architecture, _ = architecture_for(model)
    raw = json.loads(json.dumps(config_to_hf(architecture.config, model)))
    assert same_model(config_to_megatron(architecture.config, raw, source="t"), model)


def test_transformers_own_config_is_understood() -> None:
    raw = LlamaConfig(
        hidden_size=48, num_attention_heads=4, num_key_value_heads=2, intermediate_size=80, rope_theta=5e5
    ).to_dict()
    model = config_to_megatron(LLAMA.config, {k: v for k, v in raw.items()}, source="t")
    assert (model.hidden_size, model.query_groups, model.rotary_base) == (48, 2, 5e5)


def test_old_and_new_rope_keys_are_written() -> None:
    raw = config_to_hf(LLAMA.config, tiny_model(rotary_base=5e5))
    assert raw["rope_theta"] == 5e5
    assert raw["rope_parameters"] == {"rope_theta": 5e5, "rope_type": "default"}


@pytest.mark.parametrize(
    ("hf_class", "change", "expected"),
    [
        ("LlamaForCausalLM", {"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "rope_type = 'longrope'"),
        ("LlamaForCausalLM", {"hidden_act": "relu"}, "hidden_act = 'relu'"),
        ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": False}, "attention_bias = True, mlp_bias = False"),
        ("LlamaForCausalLM", {"sliding_window": 512}, "sliding_window = 512: may change the model and is not under"),
        ("LlamaForCausalLM", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config = "),
        ("LlamaForCausalLM", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5: this class rotates whole"),
        ("MistralForCausalLM", {"sliding_window": -1}, "model.sliding_window = -1: must be greater than or equal to 1"),
        ("MistralForCausalLM", {"sliding_window": 0}, "model.sliding_window = 0: must be greater than or equal to 1"),
        (
            "MistralForCausalLM",
            {"sliding_window": 5, "layer_types": [FULL] * 3},
            "this class has the same attention in",
        ),
        ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 0}, "model.sliding_window = 0: must be gr"),
        ("Qwen2ForCausalLM", {"use_sliding_window": False, "layer_types": [SLIDING] * 3}, "layer_types names sliding"),
        ("Qwen2ForCausalLM", {"layer_types": [SLIDING]}, "needs one entry for each of 3 layers"),
        ("Qwen2ForCausalLM", {"layer_types": ["chunked_attention"] * 3}, "layer_types names chunked_attention: that"),
        (
            "Qwen2MoeForCausalLM",
            {"use_sliding_window": True, "sliding_window": 4, "layer_types": None},
            "use_sliding_window = True, sliding_window = 4: versions of transformers differ",
        ),
        ("Qwen3MoeForCausalLM", {"layer_types": [SLIDING, FULL, FULL]}, "this class has the same attention in every"),
        ("Qwen3ForCausalLM", {"attention_bias": True}, "attention_bias = True"),
        ("GPT2LMHeadModel", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
        ("GPT2LMHeadModel", {"embd_pdrop": 0.0}, "embd_pdrop = 0.0, resid_pdrop = 0.1: Megatron has one rate"),
        ("GPTNeoXForCausalLM", {"use_parallel_residual": True}, "use_parallel_residual = True"),
        ("GPTNeoXForCausalLM", {"use_parallel_residual": None}, "use_parallel_residual = None"),
        ("OlmoeForCausalLM", {"clip_qkv": 8.0}, "clip_qkv = 8.0"),
        (
            "OlmoeForCausalLM",
            {"head_dim": 16},
            "head_dim = 16, num_attention_heads = 6: this class has hidden_size / num",
        ),
        ("Qwen3MoeForCausalLM", {"num_experts": 5}, "num_experts = 5, num_local_experts = 6: names of one field"),
        ("DeepseekV2ForCausalLM", {"norm_topk_prob": True}, "norm_topk_prob = True: transformers' class does not"),
        ("DeepseekV2ForCausalLM", {"topk_method": "noaux_tc"}, "topk_method = 'noaux_tc'"),
        ("DeepseekV2ForCausalLM", {"moe_layer_freq": 2}, "moe_layer_freq = 2"),
        (
            "DeepseekV2ForCausalLM",
            {"num_key_value_heads": 2},
            "num_key_value_heads = 2, num_attention_heads = 6: every head",
        ),
        ("GptOssForCausalLM", {"swiglu_alpha": 1.0}, "swiglu_alpha = 1.0: only 1.702"),
        ("GptOssForCausalLM", {"attention_bias": False}, "attention_bias = False"),
        ("GptOssForCausalLM", {"rope_parameters": None}, "rope_parameters, rope_scaling: not given"),
        (
            "GptOssForCausalLM",
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "truncate": None}},
            "rope_parameters.truncate is null",
        ),
        ("GptOssForCausalLM", {"sliding_window": None}, "sliding_attention without a window (sliding_window)"),
        ("GptOssForCausalLM", {"layer_types": ["full_attention"]}, "needs one entry for each of 3 layers"),
        ("DeepseekV2ForCausalLM", {"n_shared_experts": 0}, "n_shared_experts = 0"),
        ("DeepseekV3ForCausalLM", {"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
        ("DeepseekV3ForCausalLM", {"rope_interleave": False}, "rope_interleave = False"),
        ("DeepseekV3ForCausalLM", {"topk_method": "greedy"}, "topk_method = 'greedy'"),
    ],
)
def test_what_cannot_be_said_is_refused_by_name(hf_class: str, change: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConversionError) as caught:
        read(hf_class, reference(hf_class) | change)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5}, "attention_factor = 1.5: may change"),
        ({"rope_type": "linear", "factor": 4.0, "truncate": False}, "truncate = False: may change"),
        ({"rope_type": "linear", "factor": 4.0, "type": "dynamic"}, "rope_parameters has another type than rope_type"),
        ({"full_attention": {"rope_type": "default"}}, "full_attention = "),
        (
            {"rope_type": "llama3", "factor": 8.0},
            "without low_freq_factor, high_freq_factor, original_max",
        ),
        ({"rope_type": "yarn"}, "rope_type = 'yarn' without factor; add what the model was trained with"),
        ({"rope_type": "default", "rope_theta": "x"}, "rope_parameters.rope_theta = 'x': expected a number"),
    ],
)
def test_scalings_that_megatron_lacks_are_refused(stated: dict[str, Any], expected: str) -> None:
    raw = {name: value for name, value in reference("LlamaForCausalLM").items() if name != "rope_parameters"}
    with pytest.raises(ConversionError) as caught:
        read("LlamaForCausalLM", raw | {"rope_parameters": stated})
    assert expected in str(caught.value)
    with pytest.raises(ConversionError, match="say different things"):
        read("LlamaForCausalLM", raw | {"rope_parameters": LLAMA3, "rope_scaling": {"type": "linear", "factor": 2.0}})


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 10000.0, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}},
        {"rope_parameters": LLAMA3, "rope_scaling": LLAMA3},
        {"rope_scaling": {"type": "llama3"} | {k: v for k, v in LLAMA3.items() if k != "rope_type"}},
        {"rope_parameters": LLAMA3, "rope_scaling": None},
    ],
)
def test_every_spelling_of_a_scaling_is_one(spelling: dict[str, Any]) -> None:
    raw = {name: value for name, value in reference("LlamaForCausalLM").items() if name != "rope_parameters"}
    assert read("LlamaForCausalLM", raw | spelling) == read("LlamaForCausalLM", raw | {"rope_parameters": LLAMA3})


@pytest.mark.parametrize("hf_class", ["DeepseekForCausalLM", "DeepseekV2ForCausalLM"])
@pytest.mark.parametrize("losses", [("seq_aux_loss", 0.003), ("aux_loss", 0.02), ("global_aux_loss", 0.1)])
def test_the_balance_loss_of_deepseeks_code_survives(hf_class: str, losses: tuple[str, float]) -> None:
    table = architecture_of({"architectures": [hf_class]}, source="t").config
    kind, weight = losses
    model = replace(read(hf_class, reference(hf_class)), moe_router_load_balancing_type=kind, moe_aux_loss_coeff=weight)
    raw = config_to_hf(table, model)
    if kind == "global_aux_loss":
        assert raw["aux_loss_alpha"] == 0
    else:
        assert (raw["aux_loss_alpha"], raw["seq_aux"]) == (weight, kind == "seq_aux_loss")
        assert config_to_megatron(table, raw, source="t").balance_losses == {kind: weight}
    assert not left_behind(table, raw)


def test_a_balance_loss_that_no_code_defines_is_not_taken() -> None:
    table = architecture_of({"architectures": ["DeepseekV3ForCausalLM"]}, source="t").config
    (said,) = left_behind(table, reference("DeepseekV3ForCausalLM") | {"aux_loss_alpha": 0.001, "seq_aux": True})
    assert said.startswith("aux_loss_alpha = 0.001 is not carried over")


def deepseeks_loss(scores_TE: torch.Tensor, chosen_TK: torch.Tensor, batch: int, by_sequence: bool) -> torch.Tensor:
    """DeepSeek's loss of weight 1, as `MoEGate` of DeepSeek's repositories takes it; rows by sequence."""
    experts, (tokens, k) = scores_TE.shape[1], chosen_TK.shape
    if by_sequence:
        counts = torch.zeros(batch, experts).scatter_add_(
            1, chosen_TK.view(batch, -1), torch.ones(batch, tokens // batch * k)
        )
        shares = counts / (tokens // batch * k / experts)
        return (shares * scores_TE.view(batch, -1, experts).mean(dim=1)).sum(dim=1).mean()
    share = torch.nn.functional.one_hot(chosen_TK.flatten(), experts).float().mean(0) * experts
    return (share * scores_TE.mean(0)).sum()


def test_deepseeks_balance_loss_is_megatrons() -> None:
    batch, length, experts = 3, 7, 5
    scores_BSE = torch.randn(batch, length, experts, generator=torch.Generator().manual_seed(0)).softmax(-1)
    chosen_BSK = scores_BSE.topk(2).indices
    chosen_BSE = torch.zeros_like(scores_BSE).scatter_(2, chosen_BSK, 1).bool()
    rows = [scores_BSE.flatten(0, 1), chosen_BSK.flatten(0, 1)]
    scores_TE, chosen_TE = (x.transpose(0, 1).flatten(0, 1) for x in (scores_BSE, chosen_BSE))
    ours = balance.sequence_loss(chosen_TE, scores_TE, batch, 1, None)
    torch.testing.assert_close(ours, deepseeks_loss(*rows, batch, by_sequence=True))
    ours = balance.micro_batch_loss(chosen_TE.sum(0), scores_TE, 1, None)
    torch.testing.assert_close(ours, deepseeks_loss(*rows, batch, by_sequence=False))


def test_a_type_that_is_not_of_the_class_is_refused() -> None:
    with pytest.raises(ConversionError, match="model_type = 'mistral', but LlamaForCausalLM is of the type 'llama'"):
        architecture_of({"architectures": ["LlamaForCausalLM"], "model_type": "mistral"}, source="config.json")


STOCK = [name for name in REFERENCES if name not in ("DeepseekForCausalLM", "TanukiForCausalLM")]


@pytest.mark.parametrize("hf_class", STOCK)
def test_an_absent_field_means_what_transformers_means(hf_class: str) -> None:
    """Where a config.json leaves a field out, the model read is that of transformers' default, or none."""
    raw, architecture = reference(hf_class), architecture_of({"architectures": [hf_class]}, source="test")
    config = type(REFERENCES[hf_class](Sizes()).config)
    read_alike = 0
    for name in {name for rule in architecture.config for name in rule.hf_names()} & raw.keys():
        without = {key: value for key, value in raw.items() if key != name}
        try:
            ours = read(hf_class, without)
        except ConversionError:
            continue
        theirs = read(hf_class, config.from_dict(copy.deepcopy(without)).to_dict())
        assert config_to_hf(architecture.config, ours) == config_to_hf(architecture.config, theirs), name
        read_alike += 1
    assert read_alike > 5


@pytest.mark.parametrize(
    ("hf_class", "change"),
    [
        ("LlamaForCausalLM", {"use_mrope": False, "transformers.js_config": {"a": 1}, "neftune_noise_alpha": 5}),
        ("LlamaForCausalLM", {"sliding_window": None, "quantization_config": None, "_flash_attn_2_enabled": True}),
        ("LlamaForCausalLM", {"temperature": 0.6, "max_length": 4096, "num_labels": 1, "decoder_start_token_id": 0}),
        (
            "LlamaForCausalLM",
            {"is_causal": True, "layer_types": ["full_attention"] * 3, "gradient_checkpointing": True},
        ),
        ("GPT2LMHeadModel", {"hidden_size": 48, "num_hidden_layers": 3, "max_position_embeddings": 64}),
        ("MixtralForCausalLM", {"num_experts": 6, "qkv_bias": True}),
        ("DeepseekForCausalLM", {"sliding_window": 5, "attn_implementation": "eager"}),
        ("TanukiForCausalLM", {"num_experts": 6, "unsloth_fixed": True}),
        ("MegatronExtForCausalLM", {"temperature": 0.6, "_name_or_path": "x", "unknown": None}),
    ],
)
def test_fields_that_no_code_of_the_class_reads_change_nothing(hf_class: str, change: dict[str, Any]) -> None:
    architecture = architecture_of({"architectures": [hf_class]}, source="config.json")
    own = config_to_hf(architecture.config, tiny_model())
    raw = own if hf_class == "MegatronExtForCausalLM" else reference(hf_class)
    assert architecture.model_of(raw | change, source="t") == architecture.model_of(raw, source="t")


@pytest.mark.parametrize(
    ("hf_class", "change", "expected"),
    [
        ("LlamaForCausalLM", {"is_causal": False}, "is_causal = False: may change"),
        ("LlamaForCausalLM", {"layer_types": ["sliding_attention"] * 3}, "layer_types = "),
        ("LlamaForCausalLM", {"per_layer_config": {"0": {}}}, "per_layer_config = "),
        ("LlamaForCausalLM", {"original_max_position_embeddings": 5}, "original_max_position_embeddings = 5: may"),
        ("GPT2LMHeadModel", {"hidden_size": 64}, "hidden_size = 64: may change"),
        ("MixtralForCausalLM", {"num_experts": 5}, "num_experts = 5: may change"),
        ("DeepseekForCausalLM", {"quantization_config": {"bits": 4}}, "the weights are quantized"),
        ("TanukiForCausalLM", {"num_experts": 5}, "num_experts = 5: may change"),
        ("MegatronExtForCausalLM", {"of_a_newer_version": 1}, "of_a_newer_version = 1: may change"),
    ],
)
def test_fields_that_the_code_reads_and_no_table_knows_are_refused(
    hf_class: str, change: dict[str, Any], expected: str
) -> None:
    architecture = architecture_of({"architectures": [hf_class]}, source="config.json")
    raw = {} if hf_class == "MegatronExtForCausalLM" else reference(hf_class)
    with pytest.raises(ConversionError, match="can be taken out of a copy of its config.json") as caught:
        architecture.model_of(raw | change, source="t")
    assert expected in str(caught.value)


def test_a_field_under_its_other_name_alone_is_read() -> None:
    raw = reference("GPT2LMHeadModel")
    renamed = {name: value for name, value in raw.items() if name != "n_embd"} | {"hidden_size": raw["n_embd"]}
    assert read("GPT2LMHeadModel", renamed) == read("GPT2LMHeadModel", raw)


@pytest.mark.parametrize("hf_class", ["LlamaForCausalLM", "MegatronExtForCausalLM", "DeepseekV3ForCausalLM"])
def test_places_that_name_another_theta_are_refused(hf_class: str) -> None:
    table = architecture_of({"architectures": [hf_class]}, source="t").config
    raw = {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    for places in (raw, {"rope_parameters": raw["rope_parameters"], "rope_scaling": {"rope_theta": 5e5}}):
        with pytest.raises(ConversionError, match=r"rope_theta = .*rope_theta = .*: readers differ in which they take"):
            config_to_megatron(table, places, source="t")


@pytest.mark.parametrize(
    ("hf_class", "places", "named"),
    [
        ("LlamaForCausalLM", {"rope_theta": None}, "rope_theta"),
        ("GPTNeoXForCausalLM", {"rotary_emb_base": None, "rope_parameters": None}, "rotary_emb_base"),
        (
            "Qwen3MoeForCausalLM",
            {"rope_theta": 1e4, "rope_parameters": {"rope_theta": None}},
            "rope_parameters.rope_theta",
        ),
    ],
)
def test_a_theta_that_is_null_is_refused_as_transformers_cannot_compute_it(
    hf_class: str, places: dict[str, Any], named: str
) -> None:
    raw = {**{k: v for k, v in reference(hf_class).items() if k not in ("rope_theta", "rope_parameters")}, **places}
    with pytest.raises(ConversionError, match=f"{named}.* is null: .* remove the field where that is 10000"):
        read(hf_class, raw)
    config = CONFIG_MAPPING[raw["model_type"]](**{k: v for k, v in raw.items() if k != "architectures"})
    with pytest.raises(TypeError, match="NoneType"):
        AutoModelForCausalLM.from_config(config)


def test_a_theta_that_is_null_beside_one_that_is_not_is_passed_over() -> None:
    raw = {**reference("LlamaForCausalLM"), "rope_theta": None}
    raw["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e5}
    assert read("LlamaForCausalLM", raw).rotary_base == 5e5
    assert LlamaConfig(**raw).rope_parameters["rope_theta"] == 5e5


@pytest.mark.parametrize("kind", ["linear", "dynamic"])
def test_the_first_deepseek_writes_a_scaling_as_its_code_wants_it(kind: str) -> None:
    """`_rope_scaling_validation` of DeepSeek's code takes two fields, `type` and a float `factor`, and no others."""
    raw = {k: v for k, v in reference("DeepseekForCausalLM").items() if k != "rope_parameters"} | {"rope_theta": 1e4}
    model = read("DeepseekForCausalLM", raw | {"rope_scaling": {"type": kind, "factor": 4.0}})
    assert model.rope_scaling is not None
    architecture, _ = architecture_for(model, "DeepseekForCausalLM")
    written = config_to_hf(architecture.config, model)
    assert written["rope_scaling"] == {"type": kind, "factor": 4.0}
    assert read("DeepseekForCausalLM", written) == model
    with pytest.raises(ConversionError, match="rope_type = 'yarn'.*there are default, linear, dynamic"):
        read("DeepseekForCausalLM", raw | {"rope_scaling": {"type": "yarn", "factor": 4.0}})
    yarn = YarnRopeScaling(kind="yarn", factor=4.0, original_max_position_embeddings=8)
    with pytest.raises(ConversionError, match="rope_scaling = "):
        architecture_for(replace(model, rope_scaling=yarn), "DeepseekForCausalLM")


def test_activations_of_another_name_are_the_same_function() -> None:
    x = torch.linspace(-20, 20, 100_001, dtype=torch.float64)
    ours = {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
        "quick_gelu": quick_gelu,
    }
    for name, meant in SPELLINGS.items():
        # gelu_fast's constant has ten digits; fp32 rounds to 6e-8.
        assert float((ACT2FN[name](x) - ours[meant](x)).abs().max()) < 1e-9, name
    named = {"gelu_10", "relu2", "xielu"} & ACT2FN.keys()
    for name in named:
        with pytest.raises(ConversionError, match=f"hidden_act = '{name}': can be silu, swish, gelu, .*gelu_fast"):
            read("LlamaForCausalLM", reference("LlamaForCausalLM") | {"hidden_act": name})


def test_a_class_is_found_under_its_former_name_or_by_its_type() -> None:
    for raw in (
        {"architectures": ["LLaMAForCausalLM"]},
        {"model_type": "llama"},
        {"architectures": None, "model_type": "llama"},
    ):
        assert architecture_of(raw, source="t") is LLAMA
    for raw in ({"architectures": "LlamaForCausalLM"}, {"architectures": [5]}, {"architectures": []}, {}):
        with pytest.raises(ConversionError, match="t: architectures = "):
            architecture_of(raw, source="t")


def test_all_unknown_fields_come_in_one_message() -> None:
    raw = reference("LlamaForCausalLM") | {"sliding_window": 5, "hidden_act": "relu"}
    with pytest.raises(ConversionError, match=r"(?s)sliding_window.*hidden_act"):
        read("LlamaForCausalLM", raw)


def test_unknown_architectures_are_named() -> None:
    with pytest.raises(ConversionError, match="Falcon.*supported: LlamaForCausalLM, .*MegatronExtForCausalLM"):
        architecture_of({"architectures": ["FalconForCausalLM"]}, source="config.json")
