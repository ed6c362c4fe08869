"""Tensors of stock classes as other writers name and store them: understood, or refused by name."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_ext.checkpoint.hf_directory import HuggingFaceSource
from megatron_ext.errors import ConversionError
from megatron_ext.model_io.compare import compare_weights
from megatron_ext.model_io.convert import convert
from tests.unit.model_io.readme_table import REMOTE
from tests.unit.model_io.references import REFERENCES, Sizes, Tensors, randomize

STOCK_MOE = [name for name in REFERENCES if name not in REMOTE and "Moe" in name or "Mixtral" in name or "V3" in name]


@pytest.mark.parametrize("hf_class", STOCK_MOE)
def test_experts_fused_in_one_tensor_are_read(hf_class: str, tmp_path: Path) -> None:
    s = Sizes()
    network = REFERENCES[hf_class](s)
    randomize(network)
    network.save_pretrained(tmp_path / "each")
    network.save_pretrained(tmp_path / "fused", save_original_format=False)
    fused = HuggingFaceSource(tmp_path / "fused").specs
    assert any(name.endswith("mlp.experts.gate_up_proj") and len(spec.shape) == 3 for name, spec in fused.items())
    for name in ("each", "fused"):
        convert(tmp_path / name, tmp_path / f"megatron {name}")
    assert not compare_weights(tmp_path / "megatron each", tmp_path / "megatron fused").different
    assert not compare_weights(tmp_path / "fused", tmp_path / "megatron each").different


def resave(directory: Path, change: Callable[[Tensors], Tensors]) -> None:
    weights = change(load_file(directory / "model.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, directory / "model.safetensors")


OLDER_FILES: dict[str, tuple[str, Callable[[Tensors], Tensors]]] = {
    "GPT-2 as first published": (
        "GPT2LMHeadModel",
        lambda weights: (
            {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
            | {f"h.{n}.attn.bias": torch.ones(1, 1, 64, 64).tril() for n in range(3)}
        ),
    ),
    "GPT-NeoX with buffers": (
        "GPTNeoXForCausalLM",
        lambda weights: (
            weights
            | {f"gpt_neox.layers.{n}.attention.rotary_emb.inv_freq": torch.ones(2) for n in range(3)}
            | {f"gpt_neox.layers.{n}.attention.masked_bias": torch.tensor(-1e9) for n in range(3)}
        ),
    ),
    "GPT-NeoX under transformers 5's own names": (
        "GPTNeoXForCausalLM",
        lambda weights: {name.replace("embed_out", "lm_head"): tensor for name, tensor in weights.items()},
    ),
    "DeepSeek-V3 with a layer for a further token": (
        "DeepseekV3ForCausalLM",
        lambda weights: (
            weights
            | {"model.layers.3.eh_proj.weight": torch.ones(4, 8), "model.layers.3.mlp.gate.weight": torch.ones(3)}
        ),
    ),
}


@pytest.mark.parametrize("name", OLDER_FILES)
def test_names_and_tensors_of_other_writers_are_understood(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hf_class, change = OLDER_FILES[name]
    network = REFERENCES[hf_class](Sizes())
    randomize(network)
    for directory in (tmp_path / "now", tmp_path / "then"):
        network.save_pretrained(directory)
    resave(tmp_path / "then", change)
    for directory in ("now", "then"):
        convert(tmp_path / directory, tmp_path / f"megatron {directory}")
    assert not compare_weights(tmp_path / "megatron now", tmp_path / "megatron then").different
    assert ("tensors are left out" in caplog.text) == ("own names" not in name)


@pytest.mark.parametrize(
    ("hf_class", "extra"),
    [
        ("GPT2LMHeadModel", "transformer.h.0.attn.bias2"),
        ("GPTNeoXForCausalLM", "gpt_neox.layers.0.attention.scale"),
        ("DeepseekV3ForCausalLM", "model.layers.3.mlp.gate.weight"),
        ("MixtralForCausalLM", "model.layers.0.mlp.experts.gate_up_proj"),
    ],
)
def test_no_other_tensor_is_left_out(hf_class: str, extra: str, tmp_path: Path) -> None:
    REFERENCES[hf_class](Sizes()).save_pretrained(tmp_path / "hf")
    resave(tmp_path / "hf", lambda weights: weights | {extra: torch.ones(3, 5)})
    with pytest.raises(ConversionError, match=f"unexpected: {extra}"):
        convert(tmp_path / "hf", tmp_path / "megatron")


@pytest.mark.parametrize(
    ("hf_class", "change", "complaint"),
    [
        (
            "GPTNeoXForCausalLM",
            lambda weights: weights | {"lm_head.weight": torch.ones(101, 48)},
            "embed_out.weight is stored twice: in embed_out.weight and in lm_head.weight",
        ),
        (
            "OlmoeForCausalLM",
            lambda weights: weights | {"model.layers.0.mlp.experts.down_proj": torch.ones(6, 48, 52)},
            r"experts\.0\.down_proj\.weight is stored twice",
        ),
        (
            "OlmoeForCausalLM",
            lambda weights: weights | {"model.layers.0.mlp.experts.gate_up_proj": torch.ones(6, 105, 48)},
            r"unexpected: model\.layers\.0\.mlp\.experts\.gate_up_proj \[6, 105, 48\]",
        ),
    ],
)
def test_tensors_under_two_names_or_of_no_form_are_refused(
    hf_class: str, change: Callable[[Tensors], Tensors], complaint: str, tmp_path: Path
) -> None:
    REFERENCES[hf_class](Sizes()).save_pretrained(tmp_path / "hf")
    resave(tmp_path / "hf", change)
    with pytest.raises(ConversionError, match=complaint):
        convert(tmp_path / "hf", tmp_path / "megatron")
