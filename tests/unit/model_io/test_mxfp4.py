"""gpt-oss in MXFP4: what is unpacked is what transformers unpacks, bit for bit, and one expert at a time."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Mxfp4Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from megatron_ext.architectures.tables.mxfp4 import unpacked
from megatron_ext.architectures.tables.normalized import NormalizedHfSource
from megatron_ext.checkpoint.hf_directory import HuggingFaceSource
from megatron_ext.errors import ConversionError
from megatron_ext.model_io.compare import compare_logits
from megatron_ext.model_io.convert import convert
from megatron_ext.model_io.logits import megatron_logits
from megatron_ext.model_io.open import open_checkpoint, read_hugging_face_model
from tests.unit.model_io.references import Sizes, gpt_oss, randomize

SIZES = Sizes(layers=3, heads=4, groups=2, width=16, head=10, expert=96, experts=3)
PLAIN_LAYER = 1
# As for other classes (test_architectures.py); bf16 weights are computed with in fp32 on both sides.
TOLERANCE = 1e-5


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int16)


def test_every_pair_of_numbers_with_every_scale_is_transformers() -> None:
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 256, 16, 16).contiguous()
    scales = torch.arange(256, dtype=torch.uint8).view(1, 256, 1).expand(1, 256, 16).contiguous()
    expected, measured = convert_moe_packed_tensors(blocks, scales), unpacked(blocks, scales).transpose(1, 2)
    assert measured.dtype is torch.bfloat16
    assert torch.equal(bits(measured), bits(expected))
    one = unpacked(torch.tensor([[0x21, *15 * [0xF0]]], dtype=torch.uint8), torch.tensor([129], dtype=torch.uint8))
    assert one.tolist() == [2.0, 4.0, *15 * [0.0, -24.0]]  # codes 1 and 2 are 0.5 and 1, times 4; 15 is -6


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as the published ones are: experts packed, in all layers but one, which the configuration leaves out."""
    directory, network = tmp_path_factory.mktemp("mxfp4"), gpt_oss(SIZES)
    randomize(network)
    network.to(torch.bfloat16).save_pretrained(directory)
    tensors, generator = load_file(directory / "model.safetensors"), torch.Generator().manual_seed(4)
    for name in [name for name in tensors if ".experts." in name and not name.endswith("_bias")]:
        if f"layers.{PLAIN_LAYER}." not in name:
            experts, columns, rows = tensors.pop(name).shape
            shape = experts, rows, columns // 32
            tensors[f"{name}_blocks"] = torch.randint(256, (*shape, 16), generator=generator).to(torch.uint8)
            tensors[f"{name}_scales"] = torch.randint(118, 126, shape, generator=generator).to(torch.uint8)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    change_config(directory, {"quant_method": "mxfp4", "modules_to_not_convert": [*LEFT_OUT]})
    return directory


LEFT_OUT = "model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head", f"model.layers.{PLAIN_LAYER}.mlp.experts"


def change_config(directory: Path, quantization: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantization}))


def test_import_is_what_transformers_unpacks_and_exports_in_bf16(packed: Path, tmp_path: Path) -> None:
    convert(packed, tmp_path / "megatron")
    convert(tmp_path / "megatron", tmp_path / "back")
    network = AutoModelForCausalLM.from_pretrained(
        packed, quantization_config=Mxfp4Config(dequantize=True), attn_implementation="eager", dtype=torch.float32
    )
    network.config._experts_implementation = "eager"
    tokens = torch.randint(0, SIZES.vocabulary, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = network(tokens).logits
    compared = compare_logits([expected], megatron_logits(tmp_path / "megatron", [tokens]))
    print(f"MXFP4: max |d| / scale {compared.relative:.1e}")
    assert compared.relative < TOLERANCE
    files, back = load_file(packed / "model.safetensors"), HuggingFaceSource(tmp_path / "back")
    unpacked_by_transformers = {
        name.removesuffix("_blocks"): convert_moe_packed_tensors(tensor, files[name.replace("_blocks", "_scales")])
        for name, tensor in files.items()
        if name.endswith("_blocks")
    }
    stored = {name: tensor for name, tensor in files.items() if not name.endswith(("_blocks", "_scales"))}
    assert len(unpacked_by_transformers) == 2 * (SIZES.layers - 1)
    for name, tensor in (stored | unpacked_by_transformers).items():
        assert torch.equal(bits(back.read(name)), bits(tensor)), name
    assert back.specs.keys() == stored.keys() | unpacked_by_transformers.keys()
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())


def test_one_expert_is_unpacked_at_a_time(packed: Path) -> None:
    class Counting(HuggingFaceSource):
        largest = 0

        def read_box(self, name: str, offset: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
            tensor = super().read_box(name, offset, size)
            self.largest = max(self.largest, tensor.numel() if ".experts." in name else 0)
            return tensor

    source, (architecture, model) = Counting(packed), read_hugging_face_model(packed)
    stream = NormalizedHfSource(source, architecture, model)
    for name, spec in stream.specs.items():
        assert tuple(stream.read(name).shape) == spec.shape
    assert source.largest == 2 * SIZES.expert * SIZES.hidden  # of a layer that is not packed; packed ones have half


def test_other_quantizations_and_halves_of_one_are_refused(packed: Path, tmp_path: Path) -> None:
    tensors = load_file(packed / "model.safetensors")
    (tmp_path / "config.json").write_text((packed / "config.json").read_text())
    lost = "model.layers.0.mlp.experts.down_proj_scales"
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, tmp_path / "model.safetensors")
    with pytest.raises(ConversionError, match=r"model\.layers\.0\.mlp\.experts\.down_proj_blocks"):
        open_checkpoint(tmp_path)
    plain = {lost.removesuffix("_scales"): torch.zeros(3, 96, 64)}
    save_file(tensors | plain, tmp_path / "model.safetensors")
    with pytest.raises(ConversionError, match="is stored twice"):
        open_checkpoint(tmp_path)
    change_config(tmp_path, {"quant_method": "fp8"})
    with pytest.raises(ConversionError, match="quantization_config = .*fp8.*bf16 or MXFP4"):
        open_checkpoint(tmp_path)
