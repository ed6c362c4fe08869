"""Continuations: right with a cache, of either kind of checkpoint, within the positions, and never of NaN."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_ext.checkpoint.hf_directory import HuggingFaceSink, HuggingFaceSource
from megatron_ext.config import LoraConfig, LoraTarget, ModelConfig
from megatron_ext.data.tokenizer import load_tokenizer, train_tokenizer
from megatron_ext.errors import CheckpointError, ConversionError, DataError, EnvironmentFault
from megatron_ext.generation.sample import generate
from megatron_ext.generation.text_model import require_model, text_model
from megatron_ext.manifest import MANIFEST_FILE
from megatron_ext.merging.lora import merge_lora, silent
from megatron_ext.merging.lora_options import MergeLoraOptions
from megatron_ext.model_io.compare import Comparison
from megatron_ext.model_io.convert import convert
from megatron_ext.model_io.logits import load_hugging_face
from tests.support.workspace import write_corpus
from tests.unit.model_io.drawn_adapters import write_drawn
from tests.unit.model_io.own_models import MODELS, write_checkpoint

GREEDY = {"max_new_tokens": 12, "temperature": 0.0, "top_p": 1.0, "seed": 0}
MODEL = replace(MODELS["Tanuki with a shared expert"], vocab_size=320)
LEARNED = ModelConfig(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    vocab_size=320,
    max_position_embeddings=20,
    position_embedding_type="learned_absolute",
    normalization="LayerNorm",
    activation_func="gelu_tanh",
    gated_linear_unit=False,
    add_bias_linear=True,
    untie_embeddings_and_output_weights=False,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    return train_tokenizer([write_corpus(directory / "corpus.jsonl")], directory / "tokenizer", 320).directory


@pytest.fixture(scope="module")
def exported(tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("own")
    convert(write_checkpoint(directory / "megatron", MODEL), directory / "hf", tokenizer=tokenizer)
    return directory / "hf"


def damaged(source: Path, target: Path, value: float, name: str = "model.norm.weight") -> Path:
    """A copy of an export with `value` in one tensor."""
    tensors = HuggingFaceSource(source)
    with HuggingFaceSink(target, tensors.specs) as sink:
        for other in source.iterdir():
            if other.suffix != ".safetensors":
                (sink.partial / other.name).write_bytes(other.read_bytes())
        for each in tensors.specs:
            tensor = tensors.read(each).clone()
            if each == name:
                tensor.view(-1)[3] = value
            sink.write(each, tensor)
    return target


@torch.no_grad()
def test_greedy_continuations_are_the_likeliest_tokens(exported: Path) -> None:
    prompts = ["the model learns ", "日本語"]
    texts = generate(exported, prompts, **GREEDY)  # type: ignore[arg-type]
    network, reader = load_hugging_face(exported), load_tokenizer(exported)
    for prompt, text in zip(prompts, texts, strict=True):
        ids = reader(prompt, return_tensors="pt")["input_ids"]
        start = ids.shape[1]
        for _ in range(12):
            likeliest = network(ids, use_cache=False).logits[:, -1:].argmax(-1)
            ids = torch.cat((ids, likeliest), dim=1)
            if int(likeliest) == reader.eos_token_id:
                break
        assert text == reader.decode(ids[0, start:], skip_special_tokens=True)


def test_adapters_continue_as_the_merged_model(exported: Path, tmp_path: Path) -> None:
    config = LoraConfig(targets=[LoraTarget(rank=4, alpha=32.0)])
    adapters = write_drawn(exported, tmp_path / "adapters", config, tokenizer=exported)
    merge_lora(MergeLoraOptions(adapters=str(adapters), target=str(tmp_path / "merged"), to="hf"), silent)
    asked = ["a b", "c"]
    found = generate(adapters, asked, **GREEDY)
    assert found == generate(tmp_path / "merged", asked, **GREEDY)
    assert found != generate(exported, asked, **GREEDY)


def test_a_continuation_ends_at_the_last_learned_position(
    tokenizer: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    convert(write_checkpoint(tmp_path / "megatron", LEARNED), tmp_path / "gpt2", tokenizer=tokenizer)
    long = {**GREEDY, "max_new_tokens": 200}
    reader = load_tokenizer(tmp_path / "gpt2")
    generate(tmp_path / "gpt2", ["the model"], **long)  # type: ignore[arg-type]
    room = 20 - len(reader("the model")["input_ids"])
    assert f"the continuation of 'the model' ends after {room} tokens" in caplog.text
    assert "20 positions (max_position_embeddings)" in caplog.text
    caplog.clear()
    generate(tmp_path / "gpt2", ["the model"], **{**GREEDY, "max_new_tokens": 2})  # type: ignore[arg-type]
    assert not caplog.text
    for prompt in ("the model " * 20, "the model " * 200):
        with pytest.raises(
            DataError, match=r"has [\d,]+ tokens, but \S+gpt2 has learned 20 positions only .* at most 19"
        ):
            generate(tmp_path / "gpt2", [prompt], **GREEDY)  # type: ignore[arg-type]


def test_a_model_that_is_not_there_is_said_before_others_are_asked(exported: Path, tmp_path: Path) -> None:
    require_model(exported)
    for wrong in (tmp_path / "nothing", tmp_path):
        with pytest.raises(CheckpointError, match=re.escape(str(wrong))):
            require_model(wrong)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_said(
    value: float, exported: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = damaged(exported, tmp_path / "broken", value)
    said = r"1 of \d+ tensors hold NaN or infinite values \({}\)"
    with pytest.raises(CheckpointError, match=f"broken: {said.format('model.norm.weight')}"):
        generate(broken, ["the"], **GREEDY)  # type: ignore[arg-type]
    convert(broken, tmp_path / "megatron")
    assert re.search(said.format("decoder.final_layernorm.weight"), caplog.text)
    caplog.clear()
    with pytest.raises(ConversionError, match=r"its weights are no numbers:(?s:.)*decoder.final_layernorm.weight"):
        convert(tmp_path / "megatron", tmp_path / "back", verify=Comparison(batches=1, length=16))
    assert re.search(said.format("decoder.final_layernorm.weight"), caplog.text)


def test_logits_that_are_no_numbers_are_said(exported: Path, tmp_path: Path) -> None:
    broken = damaged(exported, tmp_path / "broken", 3e38, "model.norm.weight")
    for temperature in (0.0, 1.0):
        with pytest.raises(CheckpointError, match="logits after .* tokens are NaN or infinite"):
            generate(broken, ["the"], **{**GREEDY, "temperature": temperature})  # type: ignore[arg-type]


def test_a_checkpoint_without_a_tokenizer_and_a_prompt_without_tokens(exported: Path, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "megatron", MODEL)
    with pytest.raises(DataError, match=f"{source}: carries no tokenizer to read prompts with"):
        generate(source, ["the"], **GREEDY)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="the prompt '' has no tokens"):
        generate(exported, [""], **GREEDY)  # type: ignore[arg-type]


@pytest.mark.parametrize(("more", "complaint"), [(-1, "has unknown model.layers"), (1, "lacks model.layers")])
def test_weights_that_are_not_those_of_the_configuration_are_refused(
    more: int, complaint: str, exported: Path, tmp_path: Path
) -> None:
    """transformers fills in the missing ones with random numbers, and leaves out the others."""
    shutil.copytree(exported, tmp_path / "edited")
    config = json.loads((exported / "config.json").read_text())
    layers = config["num_hidden_layers"] + more
    changes = {"num_hidden_layers": layers, "moe_layer_pattern": (config["moe_layer_pattern"] + [1])[:layers]}
    (tmp_path / "edited" / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(
        ConversionError, match=f"does not hold the model that its config.json describes: it {complaint}"
    ):
        generate(tmp_path / "edited", ["a"], **GREEDY)


@pytest.mark.parametrize(
    ("file", "change", "complaint"),
    [
        ("generation_config.json", {"eos_token_id": 2**70}, "a model that transformers computes with"),
        ("config.json", {"gating_normalization": {"scale": "x", "eps": 0, "correction": 1}}, "transformers computes"),
        ("tokenizer_config.json", {"model_max_length": "long"}, "cannot be read as a tokenizer"),
    ],
)
def test_a_value_that_transformers_cannot_compute_with_is_one_message(
    file: str, change: dict[str, object], complaint: str, exported: Path, tmp_path: Path
) -> None:
    edited = shutil.copytree(exported, tmp_path / "edited")
    (edited / MANIFEST_FILE).unlink()
    path = edited / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises((CheckpointError, DataError), match=f"edited: .*{complaint}.* may "):
        generate(edited, ["a"], **GREEDY)  # type: ignore[arg-type]


def test_a_damaged_header_of_weights_is_one_message(exported: Path, tmp_path: Path) -> None:
    edited = shutil.copytree(exported, tmp_path / "edited")
    (edited / MANIFEST_FILE).unlink()
    weights = edited / "model.safetensors"
    weights.write_bytes(weights.read_bytes().replace(b"model.norm.weight", b"model.norm.weigh\xff"))
    with pytest.raises(ConversionError, match="edited: transformers does not load it: .*header"):
        generate(edited, ["a"], **GREEDY)  # type: ignore[arg-type]


def test_a_device_that_is_not_there_is_said_before_anything_is_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EnvironmentFault, match="device = 'cuda': torch finds no CUDA device"), \
            text_model(tmp_path / "model", device="cuda"):  # fmt: skip
        pass
