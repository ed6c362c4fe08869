"""The card of an export says what the model is, and claims no more than was done."""

import json
from pathlib import Path

import pytest

from megatron_ext.checkpoint.find import require_checkpoint
from megatron_ext.checkpoint.run_file import write_run
from megatron_ext.checkpoint.state_file import STATE_FILE
from megatron_ext.config import ModelConfig, read_yaml
from megatron_ext.errors import ConversionError
from megatron_ext.manifest import MANIFEST_FILE
from megatron_ext.model_io.compare import Comparison
from megatron_ext.model_io.convert import convert
from megatron_ext.model_io.huggingface.model_card import MODEL_CARD
from megatron_ext.model_io.logits import load_hugging_face
from megatron_ext.testing.tiny import tiny_model
from tests.support.checkpoints import MODELS, write_checkpoint


def trained(directory: Path, model: ModelConfig) -> Path:
    """A checkpoint as a run of 20 steps of 8 sequences of 32 tokens leaves it."""
    checkpoint = require_checkpoint(write_checkpoint(directory, model))
    run = read_yaml(checkpoint / "run.yaml")
    (checkpoint / MANIFEST_FILE).unlink()
    write_run(checkpoint, {**run, "data": {"sequence_length": 32}, "optimizer": {"lr": 0.003}})
    state = json.loads((checkpoint / STATE_FILE).read_text())
    (checkpoint / STATE_FILE).write_text(json.dumps(state | {"iteration": 20, "consumed_samples": 160}))
    return directory


def test_the_card_says_what_the_model_is(tmp_path: Path) -> None:
    done = convert(trained(tmp_path / "megatron", MODELS["MoE"]), tmp_path / "hf", verify=Comparison())
    card = (tmp_path / "hf" / MODEL_CARD).read_text()
    for part in (
        "library_name: transformers",
        "`MegatronExtForCausalLM`",
        done.why,
        "5 in 3 of 4 layers, 2 a token",
        "20 steps, 5,120 tokens",
        "  lr: 0.003",
        "trust_remote_code=True",
        "tensors equal bit for bit",
        "argmax agreement  100.00%",
    ):
        assert part in card, part


def test_weights_convert_without_a_training_state(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "megatron", MODELS["dense"])
    (require_checkpoint(source) / STATE_FILE).unlink()
    (require_checkpoint(source) / MANIFEST_FILE).unlink()
    convert(source, tmp_path / "hf")
    assert "steps" not in (tmp_path / "hf" / MODEL_CARD).read_text()


def test_a_card_claims_no_more_than_was_done(tmp_path: Path) -> None:
    convert(write_checkpoint(tmp_path / "megatron", MODELS["dense"]), tmp_path / "hf")
    card = (tmp_path / "hf" / MODEL_CARD).read_text()
    assert "Not compared with the model it was made of" in card
    assert "trust_remote_code" not in card
    assert "AutoTokenizer" not in card, "it has no tokenizer"
    assert "steps" not in card


def test_an_export_whose_code_is_elsewhere_says_where(tmp_path: Path) -> None:
    every = {"moe_first_k_dense": 0, "moe_layer_freq": 1, "moe_shared_expert_intermediate_size": None}
    source = write_checkpoint(tmp_path / "megatron", tiny_model(moe=True, **every))
    convert(source, tmp_path / "hf", hf_class="TanukiForCausalLM")
    card = (tmp_path / "hf" / MODEL_CARD).read_text()
    repository = "weblab-GENIAC/Tanuki-8x8B-dpo-v1.0"
    assert f"Its modelling code is in [{repository}](https://huggingface.co/{repository})" in card
    assert "trust_remote_code=True" in card
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["auto_map"] == {
        "AutoConfig": f"{repository}--configuration_tanuki.TanukiConfig",
        "AutoModelForCausalLM": f"{repository}--modeling_tanuki.TanukiForCausalLM",
    }
    with pytest.raises(ConversionError, match="brings its own modelling code; pass --trust-remote-code to run it"):
        load_hugging_face(tmp_path / "hf")
