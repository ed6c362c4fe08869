"""A tied model gets an output layer of its own: the same function, and both ends may have adapters of their own."""

from pathlib import Path

import pytest
import torch

from megatron_ext.canonical.catalogue import EMBEDDING, OUTPUT
from megatron_ext.checkpoint.streams import MegatronSource
from megatron_ext.config import LoraConfig, LoraTarget
from megatron_ext.errors import ConversionError
from megatron_ext.merging.lora import merge_lora, silent
from megatron_ext.merging.lora_options import MergeLoraOptions
from megatron_ext.model_io.adapters import open_adapters
from megatron_ext.model_io.compare import Comparison, verify
from megatron_ext.model_io.convert import convert
from megatron_ext.model_io.logits import load_hugging_face
from megatron_ext.model_io.open import open_checkpoint
from megatron_ext.model_io.peft.export import export_peft
from megatron_ext.model_io.peft.read import import_peft
from tests.support.checkpoints import MODELS, write_checkpoint
from tests.unit.model_io.drawn_adapters import write_drawn


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory of a tied model."""
    folder = tmp_path_factory.mktemp("tied")
    convert(write_checkpoint(folder / "megatron", MODELS["dense tied"]), folder / "hf")
    return folder / "hf"


def test_it_is_the_same_function(tied: Path, tmp_path: Path) -> None:
    done = convert(tied, tmp_path / "base", untie=True, verify=Comparison())
    assert done.written.verification is not None
    assert done.written.verification.passed
    weights = MegatronSource(tmp_path / "base")
    assert torch.equal(weights.read(EMBEDDING), weights.read(OUTPUT))
    convert(tied, tmp_path / "hf", to="hf", untie=True)
    network = load_hugging_face(tmp_path / "hf")
    assert not network.config.tie_word_embeddings
    assert network.lm_head.weight.data_ptr() != network.model.embed_tokens.weight.data_ptr()
    with pytest.raises(ConversionError, match="has an output layer of its own; leave out --untie"):
        convert(tmp_path / "hf", tmp_path / "again", untie=True)


def test_adapters_of_one_end_leave_the_other(tied: Path, tmp_path: Path) -> None:
    """Merged into a Hugging Face directory, which transformers loads with two ends."""
    convert(tied, tmp_path / "base", untie=True)
    only_output = LoraConfig(targets=[LoraTarget(match=["output_layer"], rank=4)])
    write_drawn(tmp_path / "base", tmp_path / "adapters", only_output)
    merge_lora(MergeLoraOptions(adapters=str(tmp_path / "adapters"), target=str(tmp_path / "hf"), to="hf"), silent)
    found = verify(tmp_path / "base", tmp_path / "hf", Comparison(logits=False))
    assert found.weights.different == (OUTPUT,)
    assert not load_hugging_face(tmp_path / "hf").config.tie_word_embeddings
    assert verify(tied, tmp_path / "hf", Comparison(logits=False)).weights.different == (OUTPUT,)


def test_adapters_of_peft_for_both_ends_need_both(tied: Path, tmp_path: Path) -> None:
    convert(tied, tmp_path / "hf", to="hf", untie=True)
    write_drawn(tmp_path / "hf", tmp_path / "adapters", LoraConfig(targets=[LoraTarget(match=["*"], rank=4)]))
    architecture = open_checkpoint(tied).architecture
    assert architecture is not None
    export_peft(open_adapters(tmp_path / "adapters"), architecture, tmp_path / "peft", "x", "stacked", force=False)

    def imported(base: Path) -> int:
        return import_peft(tmp_path / "peft", tmp_path / "back", base, torch.float32, lambda _, __: None, force=False)

    with pytest.raises(ConversionError, match=r"has no adapters; .* TARGET --to hf --untie"):
        imported(tied)
    assert imported(tmp_path / "hf") == len(open_adapters(tmp_path / "adapters").pairs)
