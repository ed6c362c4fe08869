"""Conversion as a user runs it: logits equal transformers' own, weights come back bit for bit, faults leave nothing."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from megatron_ext.checkpoint import streams as tensors
from megatron_ext.checkpoint.hf_directory import HuggingFaceSource
from megatron_ext.checkpoint.streams import MegatronSink, MegatronSource, TensorSpec
from megatron_ext.data.tokenizer import Tokenizer, train_tokenizer
from megatron_ext.errors import ConversionError
from megatron_ext.files import OURS
from megatron_ext.manifest import MANIFEST_FILE
from megatron_ext.model_io.compare import Comparison, checkpoint_logits, compare_logits, compare_weights
from megatron_ext.model_io.convert import convert
from megatron_ext.model_io.logits import load_hugging_face
from megatron_ext.testing.pool import GlooPool
from megatron_ext.testing.tiny import tiny_model
from tests.support.checkpoints import MODELS, edit_config, write_checkpoint
from tests.support.workspace import write_corpus
from tests.unit.model_io.gradients import gradients

# fp32 rounding of sums taken in another order; measured 0 (dense) to 5e-7 (MoE) of the logits' scale.
TOLERANCE = 1e-5


def megatron_and_exported_logits(source: str, exported: str) -> tuple[float, float]:
    tokens = [torch.randint(0, 250, (2, 40), generator=torch.Generator().manual_seed(1))]
    comparison = compare_logits(checkpoint_logits(source, tokens), checkpoint_logits(exported, tokens))
    return comparison.relative, comparison.argmax_agreement


@pytest.mark.parametrize("name", MODELS)
def test_export_computes_what_megatron_computes(name: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "megatron", MODELS[name])
    convert(source, tmp_path / "hf")
    relative, agreement = megatron_and_exported_logits(str(source), str(tmp_path / "hf"))
    print(f"{name}: max |d| / scale {relative:.1e}, argmax agreement {agreement:.2%}")
    assert relative < TOLERANCE
    assert agreement == 1.0


@pytest.mark.parametrize("name", MODELS)
def test_weights_come_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "megatron", MODELS[name])
    convert(source, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "back")
    assert not compare_weights(source, tmp_path / "hf").different
    assert not compare_weights(source, tmp_path / "back").different
    convert(tmp_path / "back", tmp_path / "hf again")
    first, second = HuggingFaceSource(tmp_path / "hf"), HuggingFaceSource(tmp_path / "hf again")
    assert first.specs == second.specs
    assert all(torch.equal(first.read(n), second.read(n)) for n in first.specs)
    assert (tmp_path / "hf" / "config.json").read_text() == (tmp_path / "hf again" / "config.json").read_text()


def test_transformers_own_model_is_imported(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=250,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "megatron")
    relative, agreement = megatron_and_exported_logits(str(tmp_path / "hf"), str(tmp_path / "megatron"))
    assert relative < TOLERANCE
    assert agreement == 1.0


def test_exported_moe_loads_with_trust_remote_code_and_generates_with_cache(tmp_path: Path) -> None:
    convert(write_checkpoint(tmp_path / "megatron", MODELS["MoE"]), tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True, dtype=torch.float32).eval()
    assert type(model).__name__ == "MegatronExtForCausalLM"
    prompt = torch.randint(0, 250, (2, 5), generator=torch.Generator().manual_seed(2))
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(prompt, **settings), model.generate(prompt, use_cache=False, **settings))
    eager = AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", trust_remote_code=True, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        assert torch.allclose(model(prompt).logits, eager.eval()(prompt).logits, atol=1e-5)
    padded = torch.cat((torch.zeros(2, 3, dtype=torch.long), prompt), dim=1)
    mask = torch.cat((torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 5, dtype=torch.long)), dim=1)
    with torch.no_grad():
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        assert torch.allclose(
            model(padded, attention_mask=mask, position_ids=positions).logits[:, 3:], model(prompt).logits, atol=1e-5
        )


def test_exported_code_saves_and_reloads_itself(tmp_path: Path) -> None:
    convert(write_checkpoint(tmp_path / "megatron", MODELS["MoE"]), tmp_path / "hf")
    model = load_hugging_face(tmp_path / "hf")
    model.save_pretrained(tmp_path / "saved")
    for name in ("configuration_megatron_ext.py", "modeling_megatron_ext.py"):
        shutil.copy(tmp_path / "hf" / name, tmp_path / "saved" / name)
    first, second = HuggingFaceSource(tmp_path / "hf"), HuggingFaceSource(tmp_path / "saved")
    assert first.specs == second.specs
    assert all(torch.equal(first.read(n), second.read(n)) for n in first.specs)


def test_dtype_is_converted_and_named_in_both_spellings(tmp_path: Path) -> None:
    convert(write_checkpoint(tmp_path / "megatron", MODELS["dense"]), tmp_path / "hf", dtype="bf16")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert {spec.dtype for spec in HuggingFaceSource(tmp_path / "hf").specs.values()} == {torch.bfloat16}


def test_missing_and_misshapen_tensors_come_in_one_message(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "megatron", tiny_model(), drop="decoder.final_layernorm.weight")
    run = source / "iter_0000000" / "run.yaml"
    (source / "iter_0000000" / MANIFEST_FILE).unlink()
    first_line, _, keys = run.read_text().partition("\n")
    assert first_line.startswith("#"), "its checksum"
    run.write_text(keys.replace("ffn_hidden_size: 96", "ffn_hidden_size: 95"))
    with pytest.raises(ConversionError) as caught:
        convert(source, tmp_path / "hf")
    message = str(caught.value)
    assert "missing: decoder.final_layernorm.weight [64]" in message
    assert "misshapen: decoder.layers.0.mlp.linear_fc1.weight is [192, 64], the configuration says [190, 64]" in message
    assert not (tmp_path / "hf").exists()
    assert not list(tmp_path.glob("*.partial"))


def test_unexpected_tensors_are_refused(tmp_path: Path) -> None:
    convert(write_checkpoint(tmp_path / "megatron", tiny_model()), tmp_path / "hf")
    config_file = tmp_path / "hf" / "config.json"
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ConversionError, match=r"unexpected: model\.layers\.3\.input_layernorm\.weight"):
        convert(tmp_path / "hf", tmp_path / "back")
    assert not (tmp_path / "back" / "iter_0000000").exists()


def test_conversion_needs_no_process_group(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "megatron", tiny_model(moe=True))
    convert(source, tmp_path / "hf")
    assert not torch.distributed.is_initialized()


def test_overrides_that_could_change_the_function_are_not_exported(tmp_path: Path) -> None:
    harmless = tiny_model(moe=True, transformer_overrides={"deallocate_pipeline_outputs": True})
    convert(write_checkpoint(tmp_path / "a", harmless), tmp_path / "hf")
    other = tiny_model(moe=True, transformer_overrides={"rotary_interleaved": True})
    with pytest.raises(ConversionError, match="sets rotary_interleaved: no table says"):
        convert(write_checkpoint(tmp_path / "b", other), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_sources_that_are_nothing_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="neither a Hugging Face directory"):
        convert(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("name", MODELS)
def test_gradients_equal_transformers(name: str, tmp_path: Path, pool: GlooPool) -> None:
    model = MODELS[name]
    if model.is_moe:
        from dataclasses import replace

        model = replace(model, moe_aux_loss_coeff=0.0)  # transformers' loss has no balance loss
    source = write_checkpoint(tmp_path / "megatron", model)
    convert(source, tmp_path / "hf")
    (differences,) = pool.run(1, gradients, str(source), str(tmp_path / "hf"))
    worst = max(differences, key=lambda n: differences[n])
    print(f"{name}: largest relative difference of a gradient {differences[worst]:.1e} ({worst})")
    # fp32 rounding through the backward pass of 4 layers; measured up to 5e-6 of the largest element.
    assert differences[worst] < 5e-5


def test_stored_layout_is_megatrons(tmp_path: Path) -> None:
    """Experts are stacked under the keys that megatron-core's own experts have."""
    source = write_checkpoint(tmp_path / "megatron", tiny_model(moe=True))
    keys = MegatronSource(source)._reader.tensors
    assert tuple(keys["decoder.layers.1.mlp.experts.experts.linear_fc1.weight"].size) == (4, 96, 64)


def test_a_tied_model_with_another_output_layer_is_refused(tmp_path: Path) -> None:
    convert(write_checkpoint(tmp_path / "megatron", MODELS["dense"]), tmp_path / "hf")
    edit_config(tmp_path / "hf", tie_word_embeddings=True)
    with pytest.raises(ConversionError, match="set tie_word_embeddings: false"):
        convert(tmp_path / "hf", tmp_path / "back")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"num_key_value_heads": 3}, "model.num_attention_heads = 4, model.num_query_groups = 3"),
        ({"rope_parameters": None, "rope_theta": "x"}, "rope_theta = 'x': expected a number"),
        ({"rope_scaling": "x"}, "rope_scaling = 'x': expected a mapping"),
    ],
)
def test_configurations_that_no_model_can_have_are_refused(
    changes: dict[str, object], complaint: str, tmp_path: Path
) -> None:
    convert(write_checkpoint(tmp_path / "megatron", MODELS["dense"]), tmp_path / "hf")
    edit_config(tmp_path / "hf", **changes)
    with pytest.raises(ConversionError, match=complaint):
        convert(tmp_path / "hf", tmp_path / "back")


def test_verification_accounts_for_every_tensor(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "megatron", MODELS["dense"])
    convert(source, tmp_path / "hf")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / MANIFEST_FILE).unlink()
    save_file(weights | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}, tmp_path / "hf/model.safetensors")
    with pytest.raises(ConversionError, match=r"unexpected: model\.layers\.0\.self_attn\.q_proj\.bias"):
        compare_weights(source, tmp_path / "hf")
    weights.pop("model.norm.weight")
    save_file(weights, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(ConversionError, match=r"missing: model\.norm\.weight"):
        compare_weights(source, tmp_path / "hf")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_never_equal(value: float) -> None:
    x = torch.randn(1, 3, 5, generator=torch.Generator().manual_seed(0))
    y = x.clone()
    y[0, 1, 2] = value
    assert compare_logits([x], [x]).relative == 0
    for a, b in ((x, y), (y, x), (y, y), (torch.zeros_like(x), x)):
        assert compare_logits([a], [b]).relative == float("inf")


def test_weights_that_are_no_numbers_are_named_by_verification(tmp_path: Path) -> None:
    convert(write_checkpoint(tmp_path / "megatron", MODELS["dense"]), tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"][3] = float("nan")
    path.unlink()
    save_file(weights, path)
    (tmp_path / "hf" / MANIFEST_FILE).unlink()
    with pytest.raises(ConversionError, match=r"again: not written, its weights are no numbers:") as refusal:
        convert(tmp_path / "hf", tmp_path / "again", to="hf", verify=Comparison(logits=False))
    assert "weights: 1 of 27 tensors hold NaN or infinite values (decoder.final_layernorm.weight)" in str(refusal.value)
    assert "verdict: no model: its weights are no numbers" in str(refusal.value)
    assert "inf:" not in str(refusal.value)


def test_a_failed_conversion_leaves_no_folder(tmp_path: Path) -> None:
    convert(write_checkpoint(tmp_path / "megatron", MODELS["dense"]), tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ConversionError):
        convert(tmp_path / "hf", tmp_path / "new" / "back")
    specs = {"decoder.final_layernorm.weight": TensorSpec((64,), torch.float32)}
    with pytest.raises(KeyboardInterrupt), MegatronSink(tmp_path / "new" / "back", specs, {}):
        raise KeyboardInterrupt
    assert not (tmp_path / "new").exists()


def test_a_killed_conversion_can_be_repeated(tmp_path: Path) -> None:
    (tmp_path / "back" / "iter_0000000.partial").mkdir(parents=True)
    write_checkpoint(tmp_path / "back", MODELS["dense"])
    assert [path.name for path in (tmp_path / "back").glob("iter_*")] == ["iter_0000000"]


def test_the_source_is_never_replaced(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "megatron", MODELS["dense"])
    for target in (source, tmp_path):
        with pytest.raises(ConversionError, match="holds what is read"):
            convert(source, target, force=True)
    assert (source / "iter_0000000" / ".metadata").is_file()


def test_checkpoints_and_exports_carry_the_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = train_tokenizer([write_corpus(tmp_path / "corpus.jsonl")], tmp_path / "tokenizer", 320)
    model = tiny_model(vocab_size=320)
    convert(write_checkpoint(tmp_path / "plain", model), tmp_path / "hf", tokenizer=tokenizer.directory)
    convert(tmp_path / "hf", tmp_path / "back")
    shutil.rmtree(tokenizer.directory)
    shutil.rmtree(tmp_path / "hf")
    monkeypatch.chdir("/")
    convert(tmp_path / "back", tmp_path / "hf again")
    assert (
        Tokenizer(tmp_path / "hf again").fingerprint == Tokenizer(tmp_path / "back/iter_0000000/tokenizer").fingerprint
    )
    small = write_checkpoint(tmp_path / "small", tiny_model(vocab_size=300))
    with pytest.raises(ConversionError, match="20 tokens, such as 300 .* lie beyond the model's vocab_size, 300"):
        convert(small, tmp_path / "x", tokenizer=tmp_path / "hf again")


def test_a_training_run_is_not_written_into(tmp_path: Path) -> None:
    convert(write_checkpoint(tmp_path / "megatron", MODELS["dense"]), tmp_path / "hf")
    write_checkpoint(tmp_path / "run", MODELS["dense"])
    (tmp_path / "run" / "iter_0000000").rename(tmp_path / "run" / "iter_0000080")
    with pytest.raises(ConversionError, match="holds a training run"):
        convert(tmp_path / "hf", tmp_path / "run", force=True)
    assert [path.name for path in (tmp_path / "run").glob("iter_*")] == ["iter_0000080"]


def test_a_model_split_unevenly_in_training_is_compared(tmp_path: Path) -> None:
    uneven = {"num_layers_in_first_pipeline_stage": 1, "num_layers_in_last_pipeline_stage": 3}
    source = write_checkpoint(tmp_path / "megatron", tiny_model(transformer_overrides=uneven))
    convert(source, tmp_path / "hf")
    relative, _ = megatron_and_exported_logits(str(source), str(tmp_path / "hf"))
    assert relative < TOLERANCE


def test_leftovers_of_a_killed_conversion_do_not_count_as_used_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_checkpoint(tmp_path / "megatron", MODELS["dense"])
    leftovers = tmp_path / "hf.partial"
    leftovers.mkdir()
    (leftovers / OURS).touch()
    (leftovers / "model.safetensors").touch()
    monkeypatch.setattr(
        tensors.shutil, "disk_usage", lambda folder: SimpleNamespace(free=0 if leftovers.exists() else 2**40)
    )
    convert(source, tmp_path / "hf")
    assert not leftovers.exists()
