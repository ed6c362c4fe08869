"""Adapters go to PEFT and come back: loaded by PEFT itself they compute what the merged weights do."""

import importlib.util
import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_ext.canonical.catalogue import OUTPUT
from megatron_ext.config import LoraConfig, LoraTarget
from megatron_ext.errors import ConversionError
from megatron_ext.merging.lora import merge_lora, silent
from megatron_ext.merging.lora_options import MergeLoraOptions
from megatron_ext.model_io.adapters import Adapters, open_adapters
from megatron_ext.model_io.open import open_checkpoint
from megatron_ext.model_io.peft.export import PREFIX, export_peft
from megatron_ext.model_io.peft.files import CONFIG_FILE, WEIGHTS_FILE, read_directory
from megatron_ext.model_io.peft.read import import_peft
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

IN_LAYERS = replace(EVERYWHERE, targets=[EVERYWHERE.targets[0], LoraTarget(match=["layers.*"], rank=4, alpha=8.0)])


def reference(name: str, directory: Path) -> Path:
    """A Hugging Face directory of this class."""
    if name == "MegatronExtForCausalLM":
        return export(directory, "Qwen3-MoE with a shared expert")[1]
    network = references.REFERENCES[name](SIZES) if name not in MAKERS else getattr(references, MAKERS[name])(SIZES)
    references.randomize(network)
    references.save(network, directory / "hf", name, SIZES)
    return directory / "hf"


MAKERS = {
    "LlamaForCausalLM": "llama",
    "MixtralForCausalLM": "mixtral",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "DeepseekV3ForCausalLM": "deepseek_v3",
    "GPT2LMHeadModel": "gpt2",
    "GPTNeoXForCausalLM": "gpt_neox",
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
    base = reference(name, tmp_path)
    is_tied = not open_checkpoint(base).model.untie_embeddings_and_output_weights
    compare_with_merged(name, base, IN_LAYERS if is_tied else EVERYWHERE, tmp_path)


@needs_peft
def test_experts_with_gate_and_up_by_turns_are_merged_alone(tmp_path: Path) -> None:
    """Adapters of gpt-oss's attention go to PEFT, those of its experts into the weights."""
    base = reference("GptOssForCausalLM", tmp_path)
    write_drawn(base, tmp_path / "all", EVERYWHERE)
    architecture = open_checkpoint(base).architecture
    assert architecture is not None
    with pytest.raises(ConversionError, match="gate and up by turns.*merge them into the weights"):
        export_peft(open_adapters(tmp_path / "all"), architecture, tmp_path / "no", "base", "experts", force=False)
    merge_lora(MergeLoraOptions(adapters=str(tmp_path / "all"), target=str(tmp_path / "merged all"), to="hf"), silent)
    attention = LoraConfig(targets=[LoraTarget(match=["q", "k", "v", "o", "output_layer"], rank=4, alpha=8.0)])
    compare_with_merged("gpt-oss", base, attention, tmp_path)


def compare_with_merged(name: str, base: Path, config: LoraConfig, tmp_path: Path) -> None:
    """PEFT's logits of `base` with adapters against those of the merged weights."""
    from peft import PeftModel

    opened = open_checkpoint(base)
    assert opened.architecture is not None
    write_drawn(base, tmp_path / "adapters", config)
    merge_lora(MergeLoraOptions(adapters=str(tmp_path / "adapters"), target=str(tmp_path / "merged"), to="hf"), silent)
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
    import_peft(tmp_path / "peft", tmp_path / "back", base, torch.float32, no_progress, force=False)
    assert_products_are_equal(open_adapters(tmp_path / "back"), adapters)


def no_progress(done: int, total: int) -> None:
    """Nobody looks."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Qwen3-MoE `hf`, `adapters` of it and those as `stacked` and `experts`."""
    folder = tmp_path_factory.mktemp("exported")
    reference("Qwen3MoeForCausalLM", folder)
    write_drawn(folder / "hf", folder / "adapters", EVERYWHERE)
    architecture = open_checkpoint(folder / "hf").architecture
    assert architecture is not None
    for layout in ("stacked", "experts"):
        adapters = open_adapters(folder / "adapters")
        export_peft(adapters, architecture, folder / layout, "base", layout, force=False)  # type: ignore[arg-type]
    return folder


@pytest.mark.parametrize("layout", ["stacked", "experts"])
def test_adapters_come_back_as_they_were(layout: str, exported: Path, tmp_path: Path) -> None:
    """Of one tensor with gate and up, too, where each has a block of its own."""
    import_peft(exported / layout, tmp_path / "back", exported / "hf", torch.float32, no_progress, force=False)
    before, after = open_adapters(exported / "adapters"), open_adapters(tmp_path / "back")
    assert after.base_fingerprint == before.base_fingerprint
    assert sum(len(target.match) for target in after.config.targets) < 20, "layers alike are named together"
    expected, found = ({pair.weight + pair.projection: pair for pair in one.pairs} for one in (before, after))
    for key, pair in found.items():
        if "gate" not in key and "up" not in key:
            assert (pair.rank, pair.scale) == (expected[key].rank, expected[key].scale)
    assert_products_are_equal(after, before)


def assert_products_are_equal(measured: Adapters, wanted: Adapters) -> None:
    """Of every projection, but for the padding of the vocabulary."""
    expected, found = ({pair.weight + pair.projection: pair for pair in one.pairs} for one in (wanted, measured))
    assert sorted(expected) == sorted(found)
    for key, pair in found.items():
        products = []
        for adapters, one in ((measured, pair), (wanted, expected[key])):
            product = one.scale * (adapters.tensors.read(one.b).float() @ adapters.tensors.read(one.a).float())
            product = product.t() if one.projection == "embed" else product
            products.append(product[: SIZES.vocabulary] if one.projection in ("head", "embed") else product)
        assert torch.allclose(*products, atol=1e-6), key


def changed(source: Path, target: Path, **fields: Any) -> Path:
    """A PEFT directory with other fields in its configuration."""
    shutil.copytree(source, target)
    config = json.loads((target / CONFIG_FILE).read_text())
    (target / CONFIG_FILE).write_text(json.dumps(config | fields))
    return target


def test_older_shapes_of_experts_are_understood(exported: Path, tmp_path: Path) -> None:
    """PEFT before 0.19 took [experts, out, in] for [experts, in, out]: A and B change places, transposed."""
    config, tensors = read_directory(exported / "stacked")
    for key in [key for key in tensors if "experts" in key and key.endswith("lora_A.weight")]:
        other = key.replace("lora_A", "lora_B")
        a_ERI = tensors[key].unflatten(0, (SIZES.experts, -1))
        b_ERO = tensors[other].unflatten(1, (-1, SIZES.experts)).permute(2, 1, 0)
        tensors[key] = b_ERO.flatten(0, 1).contiguous()
        tensors[other] = a_ERI.permute(2, 1, 0).flatten(1, 2).contiguous()
    old = changed(exported / "stacked", tmp_path / "old", peft_version="0.18.1")
    save_file(tensors, old / WEIGHTS_FILE)
    import_peft(old, tmp_path / "back", exported / "hf", torch.float32, no_progress, force=False)
    import_peft(exported / "stacked", tmp_path / "new", exported / "hf", torch.float32, no_progress, force=False)
    assert config["target_parameters"]
    one, two = (open_adapters(tmp_path / name) for name in ("back", "new"))
    assert all(torch.equal(one.tensors.read(pair.a), two.tensors.read(pair.a)) for pair in one.pairs)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "use_dora is True"),
        ({"bias": "all", "init_lora_weights": "pissa"}, "bias is 'all', init_lora_weights is 'pissa'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ({"r": "many"}, "no numbers"),
        ({"r": 5}, r"has \d+ rows, and adapter_config.json says r = 5 for it"),
        ({"alora_invocation_tokens": [1]}, r"alora_invocation_tokens is \[1\]"),
        ({"lora_of_tomorrow": {"on": True}}, "lora_of_tomorrow is"),
    ],
    ids=lambda value: str(value)[:20] if isinstance(value, str) else next(iter(value)),
)
def test_what_is_no_plain_lora_is_refused(fields: dict[str, Any], message: str, exported: Path, tmp_path: Path) -> None:
    source = changed(exported / "stacked", tmp_path / "other", **fields)
    if "r" in fields:
        source = changed(source, tmp_path / "another", rank_pattern={})
    with pytest.raises(ConversionError, match=message):
        import_peft(source, tmp_path / "back", exported / "hf", torch.float32, no_progress, force=False)
    assert not (tmp_path / "back").exists()


def test_a_copy_of_the_base_beside_adapters_of_its_ends_is_passed_over(exported: Path, tmp_path: Path) -> None:
    """PEFT writes one unless told otherwise; other weights in its place would be lost."""
    source, base = changed(exported / "stacked", tmp_path / "other"), exported / "hf"
    _, tensors = read_directory(source)
    head, key = open_checkpoint(base).tensors.read(OUTPUT)[: SIZES.vocabulary], f"{PREFIX}lm_head.base_layer.weight"
    save_file(tensors | {key: head.bfloat16()}, source / WEIGHTS_FILE)
    import_peft(source, tmp_path / "back", base, torch.float32, no_progress, force=False)
    assert_products_are_equal(open_adapters(tmp_path / "back"), open_adapters(exported / "adapters"))
    save_file(tensors | {key: head + 1}, source / WEIGHTS_FILE)
    with pytest.raises(ConversionError, match="lm_head.base_layer.weight is another than that of the base"):
        import_peft(source, tmp_path / "again", base, torch.float32, no_progress, force=False)


def test_tensors_of_another_model_are_named(exported: Path, tmp_path: Path) -> None:
    source = changed(exported / "stacked", tmp_path / "other")
    _, tensors = read_directory(source)
    save_file(
        tensors | {"base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": torch.zeros(2, 2)},
        source / WEIGHTS_FILE,
    )
    with pytest.raises(ConversionError, match=r"1 tensors belong to no projection of the model: model\.layers\.9"):
        import_peft(source, tmp_path / "back", exported / "hf", torch.float32, no_progress, force=False)
