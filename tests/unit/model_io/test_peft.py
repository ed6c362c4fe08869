"""Adapters go to PEFT and come back: loaded by PEFT itself they compute what the merged weights do."""

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.config import LoraConfig, LoraTarget
from megatron_ext.merging.lora import merge_lora
from megatron_ext.merging.lora_options import MergeLoraOptions
from megatron_ext.model_io.adapters import open_adapters
from megatron_ext.model_io.open import open_checkpoint
from megatron_ext.model_io.peft.export import export_peft
from tests.support.bars import no_bar
from tests.unit.model_io import references
from tests.unit.model_io.drawn_adapters import write_drawn
from tests.unit.model_io.own_models import export

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
# transformers multiplies the experts of a layer by a kernel that takes rows of whole 16 bytes.
SIZES = references.Sizes(expert=24)
EVERYWHERE = LoraConfig(
    targets=[
        LoraTarget(match=["up", "k", "layers.1.*.down"], rank=2, alpha=6.0),
        LoraTarget(match=["layers.*", "embedding.*", "output_layer"], rank=4, alpha=8.0),
    ]
)


def reference(name: str, directory: Path) -> Path:
    """A Hugging Face directory of this class."""
    if name == "MegatronExtForCausalLM":
        return export(directory, "Qwen3-MoE with a shared expert")[1]
    network = getattr(references, MAKERS[name])(SIZES)
    references.randomize(network)
    references.save(network, directory / "hf", name, SIZES)
    return directory / "hf"


MAKERS = {
    "LlamaForCausalLM": "llama",
    "MixtralForCausalLM": "mixtral",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "DeepseekV3ForCausalLM": "deepseek_v3",
}


def logits_of(model: Any) -> torch.Tensor:
    tokens = torch.arange(24).view(2, 12) * 3 + 1
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(tokens).logits
        return logits


def loaded(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype=torch.float32)


@needs_peft
@pytest.mark.parametrize("name", [*MAKERS, "MegatronExtForCausalLM"])
def test_peft_computes_what_the_merged_weights_do(name: str, tmp_path: Path) -> None:
    from peft import PeftModel

    base = reference(name, tmp_path)
    opened = open_checkpoint(base)
    assert opened.architecture is not None
    write_drawn(base, tmp_path / "adapters", EVERYWHERE)
    merge_lora(MergeLoraOptions(adapters=str(tmp_path / "adapters"), target=str(tmp_path / "merged"), to="hf"), no_bar)
    merged, plain = logits_of(loaded(tmp_path / "merged")), logits_of(loaded(base))
    adapters = open_adapters(tmp_path / "adapters")
    export_peft(adapters, opened.architecture, tmp_path / "peft", str(base), "stacked", force=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        measured = logits_of(PeftModel.from_pretrained(loaded(base), tmp_path / "peft"))
    scale = float(merged.abs().max())
    difference, effect = float((measured - merged).abs().max()) / scale, float((plain - merged).abs().max()) / scale
    print(f"{name}: {difference:.1e} of the largest logit, of an effect of {effect:.1e}")
    # Of patterns PEFT warns wrongly: it looks for them among modules alone, and takes them for parameters all the same.
    assert not [str(one.message) for one in caught if "missing" in str(one.message)]
    assert effect > 0.02
    assert difference < 1e-5
