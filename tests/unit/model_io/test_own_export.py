"""Our own class against the Megatron models it exports: logits, gradients, and every weight and field back again."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.architectures.own import MEGATRON_EXT
from megatron_ext.checkpoint.hf_directory import HuggingFaceSource
from megatron_ext.config import LearnedNoise, ModelConfig, check_model
from megatron_ext.config.base import fields_of
from megatron_ext.model_io.checkpoint_model import read_model
from megatron_ext.model_io.compare import checkpoint_logits, compare_logits, compare_weights
from megatron_ext.model_io.convert import convert
from megatron_ext.model_io.logits import load_hugging_face
from megatron_ext.testing.pool import GlooPool
from tests.support.checkpoints import edit_config
from tests.unit.model_io.gradients import gradients
from tests.unit.model_io.own_models import MODELS, SCALED, export, tokens, write_checkpoint

# fp32 rounding of sums taken in another order: measured up to 2.4e-6 of the logits' scale.
TOLERANCE = 1e-5


def report(name: str, source: Path, exported: Path) -> None:
    batch = [tokens()]
    comparison = compare_logits(checkpoint_logits(source, batch), checkpoint_logits(exported, batch))
    print(f"{name}: max |d| / scale {comparison.relative:.1e}, argmax agreement {comparison.argmax_agreement:.2%}")
    assert comparison.relative < TOLERANCE
    assert comparison.argmax_agreement == 1.0


def test_the_models_use_every_field() -> None:
    """A field that no model sets is a field whose export nobody has tried."""
    models = MODELS.values()
    for model in models:
        check_model(model, source="own_models.py")
    untried = [
        name
        for name, info in fields_of(ModelConfig).items()
        if all(getattr(model, name) == info.get_default(call_default_factory=True) for model in models)
    ]
    # Overrides that change the function are refused (test_convert.py), others are about the run and do not travel.
    assert untried == ["transformer_overrides"]


def test_every_field_travels() -> None:
    carried = {name for rule in MEGATRON_EXT.config for name in rule.megatron_names()}
    assert carried == set(fields_of(ModelConfig)) - {"transformer_overrides"}


@pytest.mark.parametrize("name", MODELS)
def test_export_computes_what_megatron_computes_and_comes_back(name: str, tmp_path: Path) -> None:
    source, exported = export(tmp_path, name)
    report(name, source, exported)
    convert(exported, tmp_path / "back")
    assert not compare_weights(source, tmp_path / "back").different
    assert canonical(read_model(tmp_path / "back")) == canonical(MODELS[name])
    convert(tmp_path / "back", tmp_path / "again", hf_class="MegatronExtForCausalLM")
    assert (tmp_path / "again" / "config.json").read_text() == (exported / "config.json").read_text()
    first, second = HuggingFaceSource(exported), HuggingFaceSource(tmp_path / "again")
    assert first.specs == second.specs
    assert all(torch.equal(first.read(n), second.read(n)) for n in first.specs)


def canonical(model: ModelConfig) -> dict[str, Any]:
    """The configuration with one spelling for what has several."""
    said = {name: getattr(model, name) for name in fields_of(ModelConfig)}
    return said | {
        "num_query_groups": model.query_groups,
        "kv_channels": model.head_dim,
        "moe_ffn_hidden_size": model.expert_ffn_hidden_size,
        "moe_router_norm_topk_prob": model.normalizes_topk,
        "window_attn_skip_freq": model.window_layer_pattern,
        "moe_layer_freq": model.moe_layer_pattern,
        "moe_first_k_dense": None,
    }


@pytest.mark.parametrize("name", SCALED)
def test_kinds_of_rotary_embedding_are_told_apart(name: str, tmp_path: Path) -> None:
    source, exported = export(tmp_path, name)
    edit_config(exported, rope_parameters=None, rope_scaling=None, partial_rotary_factor=None)
    without = compare_logits(checkpoint_logits(source, [tokens()]), checkpoint_logits(exported, [tokens()]))
    assert without.relative > 1e-3


def test_bf16_export_computes_nearly_the_same_and_keeps_the_expert_bias(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source, exported = export(tmp_path, "DeepSeek-V3 with normalized gating")
    network = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.bfloat16, trust_remote_code=True).eval()
    stored = HuggingFaceSource(exported).read("model.layers.1.mlp.gate.e_score_correction_bias")
    bias = network.model.layers[1].mlp.gate.e_score_correction_bias
    assert network.lm_head.weight.dtype == torch.bfloat16
    assert bias.dtype == torch.float32
    assert torch.equal(bias, stored)
    (expected,) = checkpoint_logits(source, [tokens()])
    with torch.no_grad():
        logits = network(tokens()).logits.float()
    agreement = float((logits.argmax(-1) == expected.argmax(-1)).float().mean())
    error = float((logits - expected).square().mean().sqrt() / expected.square().mean().sqrt())
    print(f"bf16: argmax agreement {agreement:.1%}, root mean square error {error:.1%} of the logits")
    # bf16 keeps 8 bits, and a token may be sent to another expert by it; random weights tell tokens little apart.
    assert agreement > 0.8
    assert error < 0.15


@pytest.mark.parametrize("name", ["GPT-2 with experts", "DeepSeek-V3 with normalized gating", "OLMoE with biases"])
def test_gradients_are_megatrons(name: str, tmp_path: Path, pool: GlooPool) -> None:
    # Losses that transformers does not have, what is drawn at random and what has no gradient are left out.
    plain = {
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "moe_router_noise": None,
        "moe_router_enable_expert_bias": False,
        "moe_router_bias_update_rate": 1e-3,
        "moe_expert_capacity_factor": None,
        "moe_token_drop_policy": "probs",
        "moe_pad_expert_input_to_capacity": False,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_z_loss_coeff": 0.0,
        "output_z_loss_coeff": 0.0,
    }
    source = write_checkpoint(tmp_path / "megatron", replace(MODELS[name], **plain))
    convert(source, tmp_path / "hf", hf_class="MegatronExtForCausalLM")
    (differences,) = pool.run(1, gradients, str(source), str(tmp_path / "hf"))
    worst = max(differences, key=lambda n: differences[n])
    print(f"{name}: largest relative difference of a gradient {differences[worst]:.1e} ({worst})")
    assert differences[worst] < 5e-5


def test_the_weight_of_learned_noise_travels(tmp_path: Path) -> None:
    name = "Qwen2-MoE with learned noise"
    assert isinstance(MODELS[name].moe_router_noise, LearnedNoise)
    _, exported = export(tmp_path, name)
    network = load_hugging_face(exported)
    stored = HuggingFaceSource(exported).read("model.layers.0.mlp.gate.noise_weight")
    assert torch.equal(network.model.layers[0].mlp.gate.noise_weight, stored)


def test_what_training_alone_reads_stands_apart(tmp_path: Path) -> None:
    _, exported = export(tmp_path, "GPT-2 with experts")
    config = json.loads((exported / "config.json").read_text())
    assert config["megatron_training"]["moe_expert_capacity_factor"] == 1.25
    assert not [name for name in config if name.startswith("moe_aux")]
