"""Every direction of a conversion, and what stands beside the weights of an export."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_ext.architectures.tables.base import Architecture
from megatron_ext.checkpoint.find import require_checkpoint
from megatron_ext.checkpoint.hf_directory import INDEX_FILE, HuggingFaceSource
from megatron_ext.checkpoint.streams import MegatronSource, TensorSpec
from megatron_ext.config import ModelConfig, load_run
from megatron_ext.errors import ConversionError
from megatron_ext.manifest import MANIFEST_FILE
from megatron_ext.model_io.checkpoint_model import read_model
from megatron_ext.model_io.compare import Comparison, compare_weights
from megatron_ext.model_io.convert import convert
from megatron_ext.model_io.huggingface.model_card import MODEL_CARD
from megatron_ext.model_io.logits import load_hugging_face
from megatron_ext.model_io.model_to_write import ModelToWrite
from megatron_ext.testing.tiny import tiny_model
from megatron_ext.training.same_run import check_same_model
from tests.support.checkpoints import MODELS, edit_config, write_checkpoint

SIGMOID = tiny_model(moe=True, moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True)


def test_megatron_to_megatron_changes_the_dtype_alone(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "fp32", MODELS["MoE"])
    done = convert(source, tmp_path / "bf16", to="megatron", dtype="bf16")
    assert (done.direction, done.architecture) == ("to Megatron", None)
    before, after = MegatronSource(source), MegatronSource(tmp_path / "bf16")
    assert all(torch.equal(after.read(name), before.read(name).bfloat16()) for name in before.specs)
    assert read_model(tmp_path / "bf16") == MODELS["MoE"]
    comparison = compare_weights(source, tmp_path / "bf16")
    assert (comparison.different, comparison.rounded_to) == ((), ("bfloat16",))


def test_an_expert_bias_keeps_its_dtype(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "fp32", SIGMOID)
    convert(source, tmp_path / "bf16", to="megatron", dtype="bf16")
    dtypes = {name: spec.dtype for name, spec in MegatronSource(tmp_path / "bf16").specs.items()}
    biases = {name for name in dtypes if name.endswith("router.expert_bias")}
    assert len(biases) == 3
    assert all((dtype is torch.float32) == (name in biases) for name, dtype in dtypes.items())


def test_hugging_face_to_hugging_face(tmp_path: Path) -> None:
    """Another class that computes the same, and back: bit for bit."""
    convert(write_checkpoint(tmp_path / "megatron", MODELS["dense"]), tmp_path / "llama")
    edit_config(tmp_path / "llama", bos_token_id=3, eos_token_id=5)
    done = convert(tmp_path / "llama", tmp_path / "ours", hf_class="MegatronExtForCausalLM")
    assert done.architecture is not None
    assert done.architecture.hf_class == "MegatronExtForCausalLM"
    back = convert(tmp_path / "ours", tmp_path / "back", hf_class="LlamaForCausalLM")
    assert "LlamaForCausalLM" in back.why
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("llama", "back")]
    assert files[0] == files[1]
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("llama", "back")]
    assert configs[0] == configs[1], "special tokens included"
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text())["eos_token_id"] == 5


def test_hugging_face_in_another_dtype_keeps_its_class(tmp_path: Path) -> None:
    convert(
        write_checkpoint(tmp_path / "megatron", MODELS["dense"]), tmp_path / "ours", hf_class="MegatronExtForCausalLM"
    )
    done = convert(tmp_path / "ours", tmp_path / "half", to="hf", dtype="fp16")
    assert "MegatronExtForCausalLM, as before" in done.why
    assert {spec.dtype for spec in HuggingFaceSource(tmp_path / "half").specs.values()} == {torch.float16}


def test_a_class_that_would_compute_something_else_is_refused(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "megatron", MODELS["MoE"])
    with pytest.raises(ConversionError, match="LlamaForCausalLM"):
        convert(source, tmp_path / "hf", hf_class="LlamaForCausalLM")
    with pytest.raises(ConversionError, match="a Megatron checkpoint has no Hugging Face class"):
        convert(source, tmp_path / "hf", to="megatron", hf_class="LlamaForCausalLM")
    assert not (tmp_path / "hf").exists()


def test_code_that_is_elsewhere_is_not_run_unasked(tmp_path: Path) -> None:
    model = tiny_model(
        moe=True, moe_gating_normalization=None, moe_router_pre_softmax=True, moe_shared_expert_intermediate_size=96
    )
    source = write_checkpoint(tmp_path / "megatron", model)
    with pytest.raises(ConversionError, match="its code is in deepseek-ai/.*--no-logits"):
        convert(source, tmp_path / "hf", hf_class="DeepseekForCausalLM", verify=Comparison())
    assert not (tmp_path / "hf").exists()
    done = convert(source, tmp_path / "hf", hf_class="DeepseekForCausalLM", verify=Comparison(logits=False))
    assert done.written.verification is not None
    assert done.written.verification.passed
    card = (tmp_path / "hf" / MODEL_CARD).read_text()
    assert "trust_remote_code=True" in card
    assert "Its modelling code is in [deepseek-ai/" in card


def test_numbers_that_fp16_cannot_hold_are_named(tmp_path: Path) -> None:
    convert(write_checkpoint(tmp_path / "megatron", MODELS["dense"]), tmp_path / "hf")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    weights["model.norm.weight"][3] = 1e5
    (tmp_path / "hf" / MANIFEST_FILE).unlink(missing_ok=True)
    from safetensors.torch import save_file

    save_file(weights, tmp_path / "hf" / "model.safetensors")
    convert(tmp_path / "hf", tmp_path / "bf16", dtype="bf16")
    with pytest.raises(ConversionError, match=r"final_layernorm\.weight: has numbers that fp16 cannot hold"):
        convert(tmp_path / "hf", tmp_path / "fp16", dtype="fp16")
    assert not (tmp_path / "fp16").exists()


def test_shards_hold_what_was_asked_for_and_transformers_reads_them(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "megatron", MODELS["dense"])
    convert(source, tmp_path / "hf", shard_bytes=120_000, workers=3)
    shards = sorted((tmp_path / "hf").glob("model-*.safetensors"))
    assert len(shards) > 3
    assert all(path.stat().st_size < 130_000 for path in shards)
    weight_map = json.loads((tmp_path / "hf" / INDEX_FILE).read_text())["weight_map"]
    # A reader that goes through the layers goes through the files.
    files = [weight_map[f"model.layers.{layer}.self_attn.q_proj.weight"] for layer in range(4)]
    assert files == sorted(files)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert torch.equal(model.model.norm.weight, HuggingFaceSource(tmp_path / "hf").read("model.norm.weight"))
    assert not compare_weights(source, tmp_path / "hf").different


def test_an_index_may_name_a_tied_output_layer_that_no_shard_holds(tmp_path: Path) -> None:
    convert(write_checkpoint(tmp_path / "megatron", MODELS["dense tied"]), tmp_path / "hf", shard_bytes=20_000)
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    (tmp_path / "hf" / MANIFEST_FILE).unlink(missing_ok=True)
    index["weight_map"]["lm_head.weight"] = index["weight_map"]["model.embed_tokens.weight"]
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "hf" / MANIFEST_FILE).unlink(missing_ok=True)
    convert(tmp_path / "hf", tmp_path / "back")
    edit_config(tmp_path / "hf", tie_word_embeddings=False)
    with pytest.raises(ConversionError, match=r"names tensors that no shard holds: lm_head\.weight"):
        convert(tmp_path / "hf", tmp_path / "other")


@pytest.mark.parametrize("change", [{"initializer_range": 7.0}, {"use_cache": "yes"}, {"pad_token_id": "x"}])
def test_what_transformers_does_not_accept_is_one_message(change: dict[str, Any], tmp_path: Path) -> None:
    convert(write_checkpoint(tmp_path / "megatron", MODELS["dense tied"]), tmp_path / "hf")
    edit_config(tmp_path / "hf", **change)
    with pytest.raises(ConversionError, match=f"hf: transformers does not load it: .*{next(iter(change))}"):
        load_hugging_face(tmp_path / "hf")


@pytest.mark.parametrize(
    ("stated", "key"),
    [
        ({"router_aux_loss_coef": 0.02}, "model.moe_aux_loss_coeff"),
        ({"router_jitter_noise": 0.1}, "model.moe_router_noise"),
        ({"router_aux_loss_coef": 0.0, "router_jitter_noise": 0.0}, None),
    ],
)
def test_training_that_megatron_has_otherwise_is_said_once(
    stated: dict[str, float], key: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model(moe=True, moe_gating_normalization=None, moe_shared_expert_intermediate_size=None)
    model = replace(model, moe_first_k_dense=0, moe_layer_freq=1)
    convert(write_checkpoint(tmp_path / "megatron", model), tmp_path / "hf", hf_class="MixtralForCausalLM")
    edit_config(tmp_path / "hf", **stated)
    caplog.clear()
    convert(tmp_path / "hf", tmp_path / "back", verify=Comparison(logits=False))
    said = [message for message in caplog.messages if "is not carried over" in message]
    if key is None:
        assert not said
    else:
        ((name, value),) = stated.items()
        assert len(said) == 1
        assert f"{name} = {value}" in said[0]
        assert key in said[0]


# --- the model card -----------------------------------------------------------------------------------------


# --- verified before it gets its name -----------------------------------------------------------------------


def test_an_export_that_would_be_another_model_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that is wrong in one direction: verification finds it in the weights."""
    from megatron_ext.architectures.tables.rules import Rename

    source = write_checkpoint(tmp_path / "megatron", MODELS["dense"])
    right = Rename.to_hf

    def wrong(rule: Rename, tensor: torch.Tensor, model: ModelConfig) -> dict[str, torch.Tensor]:
        parts = right(rule, tensor, model)
        return {role: part + 1 if "o_proj" in rule.hf else part for role, part in parts.items()}

    monkeypatch.setattr(Rename, "to_hf", wrong)
    with pytest.raises(ConversionError, match="not written, it would not be the same model") as caught:
        convert(source, tmp_path / "hf", verify=Comparison(logits=False))
    assert re.search(r"weights: 4 of \d+ tensors differ, by up to 1: decoder\.layers\.0", str(caught.value))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["megatron"]


@pytest.mark.parametrize("logits", [True, False])
def test_a_config_that_says_another_function_is_found(
    logits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights under another RoPE base."""
    from megatron_ext.model_io import write as module

    source = write_checkpoint(tmp_path / "megatron", MODELS["dense"])
    write = module.write_export

    def wrong(directory: Path, architecture: Architecture, content: ModelToWrite, specs: dict[str, TensorSpec]) -> None:
        write(directory, architecture, replace(content, model=replace(content.model, rotary_base=99.0)), specs)

    monkeypatch.setattr(module, "write_export", wrong)
    with pytest.raises(ConversionError, match=r"configuration: rotary_base is 10000\.0 in .*, 99\.0 in ") as caught:
        convert(source, tmp_path / "hf", verify=Comparison(logits=logits))
    assert ("max |d|" in str(caught.value)) == logits
    assert sorted(path.name for path in tmp_path.iterdir()) == ["megatron"]


@pytest.mark.parametrize("to", ["hf", "megatron"])
def test_a_rounded_copy_is_verified_as_what_it_is(to: str, tmp_path: Path) -> None:
    """bf16 weights are the rounded ones bit for bit, and logits are compared with those of the rounded source."""
    source = write_checkpoint(tmp_path / "megatron", MODELS["MoE"])
    done = convert(source, tmp_path / "out", to=to, dtype="bf16", verify=Comparison())  # type: ignore[arg-type]
    assert done.written.verification is not None
    assert done.written.verification.weights.rounded_to == ("bfloat16",)
    assert done.written.verification.logits is not None
    print(f"to {to}: max |d| / scale {done.written.verification.logits.relative:.1e}")
    assert done.written.verification.logits.relative < 1e-5


def test_a_model_larger_than_the_memory_is_said_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    source = write_checkpoint(tmp_path / "megatron", MODELS["dense"])
    memory = type("Memory", (), {"available": 1000})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    written: list[int] = []
    with pytest.raises(ConversionError, match="do without them by --no-logits"):
        convert(source, tmp_path / "hf", verify=Comparison(), progress=lambda done, total: written.append(done))
    assert not written
    assert not (tmp_path / "hf").exists()
    convert(source, tmp_path / "hf", verify=Comparison(logits=False))


def test_a_training_configuration_stands_beside_a_megatron_target(tmp_path: Path) -> None:
    convert(write_checkpoint(tmp_path / "megatron", MODELS["MoE"]), tmp_path / "hf")
    done = convert(tmp_path / "hf", tmp_path / "runs" / "imported")
    assert done.recipe == tmp_path / "runs" / "imported.yaml"
    run = load_run(done.recipe)
    assert run.checkpoint.initialize_from == str(tmp_path / "runs" / "imported")
    assert run.checkpoint.directory == str(tmp_path / "runs" / "imported-trained")
    check_same_model(run.model, require_checkpoint(tmp_path / "runs" / "imported"))
    text = done.recipe.read_text()
    assert text.startswith(f"# Trains {tmp_path}/runs/imported, converted from {tmp_path}/hf. Made from usual values;")
    (tmp_path / "runs" / "imported").rename(tmp_path / "aside")
    with pytest.raises(ConversionError, match=r"imported\.yaml exists; choose another target or pass --force"):
        convert(tmp_path / "hf", tmp_path / "runs" / "imported")
    done.recipe.write_text("mine: true\n")
    with pytest.raises(ConversionError, match="no training configuration that was made here: not replaced"):
        convert(tmp_path / "hf", tmp_path / "runs" / "imported", force=True)
    assert not (tmp_path / "runs" / "imported").exists()


def test_a_run_in_another_dtype_goes_on_from_its_own_configuration_with_another_seed(tmp_path: Path) -> None:
    run = {
        "precision": {"kind": "fp32"},
        "train": {"train_iters": 500, "global_batch_size": 8, "seed": 5},
        "optimizer": {"kind": "adam", "lr": 4e-4},
        "data": {"sequence_length": 32, "tokenizer": "T", "cache_dir": "C", "train": [{"path": "D"}]},
        "checkpoint": {"directory": "R"},
    }
    source = write_checkpoint(tmp_path / "run", MODELS["dense"], run=run)
    done = convert(source, tmp_path / "bf16", to="megatron", dtype="bf16")
    assert done.recipe is not None
    again = load_run(done.recipe)
    assert (again.train.seed, again.optimizer.lr, again.data.train[0].path) == (1005, 4e-4, "D")
    assert done.notes == [
        "train.seed is 1005: with the source's, 5, the same samples would be read again from the first"
    ]
    assert f"# {done.notes[0]}." in done.recipe.read_text()


def test_a_run_of_stages_goes_on_as_a_run_of_its_stages(tmp_path: Path) -> None:
    stages = [{"name": "A", "mix": {"ja": 1.0}, "steps": 5}, {"name": "B", "take": {"ja": {"epochs": 1.0}}}]
    run = {
        "precision": {"kind": "fp32"},
        "train": {"train_iters": 500, "global_batch_size": 8},
        "optimizer": {"kind": "adam", "lr": 4e-4},
        "data": {"sequence_length": 32, "tokenizer": "T", "sources": {"ja": {"path": "D"}}, "stages": stages},
        "checkpoint": {"directory": "R"},
    }
    done = convert(
        write_checkpoint(tmp_path / "run", MODELS["dense"], run=run), tmp_path / "o", to="megatron", dtype="bf16"
    )
    assert done.recipe is not None
    again = load_run(done.recipe)
    assert (again.train.train_iters, again.data.sources["ja"].path) == (0, "D")
    assert [stage.name for stage in again.data.stages] == ["A", "B"]
    assert again.data.stages[1].take["ja"].epochs == 1
