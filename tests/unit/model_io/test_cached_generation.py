"""Verification by generated tokens: right models pass, models that lose their cache or their padding do not."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.errors import ConversionError
from megatron_ext.model_io import logits as logits_module
from megatron_ext.model_io.compare import Comparison, verify
from megatron_ext.model_io.convert import convert
from megatron_ext.model_io.huggingface import companion_files as export_module
from megatron_ext.model_io.huggingface.cached_generation import compare_generation
from megatron_ext.model_io.huggingface.companion_files import shipped_code
from tests.unit.model_io.own_models import MODELS, export, tokens, write_checkpoint
from tests.unit.model_io.references import REFERENCES, Sizes


def stock(name: str) -> Any:
    """A model of transformers' own, with weights at which positions and keys matter."""
    torch.manual_seed(0)
    network = REFERENCES[name](Sizes()).eval()
    with torch.no_grad():
        for weight in network.parameters():
            if weight.dim() > 1:
                weight.normal_(std=0.2)
    return network


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "MixtralForCausalLM", "DeepseekV3ForCausalLM"])
def test_transformers_own_models_generate_what_they_compute(name: str) -> None:
    made = compare_generation(stock(name), tokens(2, 30) % 101, longest=64)
    assert made is not None
    print(f"{name}: {made}")
    assert made.tokens == 16
    assert made.relative < 1e-5


@pytest.mark.parametrize("lost", ["cache", "attention_mask", "position_ids"])
def test_what_generation_loses_is_found(lost: str) -> None:
    network = stock("MixtralForCausalLM" if lost != "position_ids" else "GPT2LMHeadModel")
    forward = network.forward

    @functools.wraps(forward)
    def forgetful(*args: Any, **kwargs: Any) -> Any:
        names = ("cache", "past_key_values") if lost == "cache" else (lost,)
        return forward(*args, **{name: value for name, value in kwargs.items() if name not in names})

    network.forward = forgetful
    made = compare_generation(network, tokens(2, 30) % 101, longest=64)
    assert made is not None
    assert made.relative > 1e-3, lost


@pytest.mark.parametrize(("longest", "expected"), [(3, None), (4, 4), (10, 10), (64, 16)])
def test_it_stays_within_the_positions(longest: int, expected: int | None) -> None:
    made = compare_generation(stock("GPT2LMHeadModel"), tokens(2, 30) % 101, longest=longest)
    assert (made.tokens if made else None) == expected


def test_not_a_number_is_no_agreement() -> None:
    network = stock("MixtralForCausalLM")
    with torch.no_grad():
        network.lm_head.weight[5] = float("nan")
    made = compare_generation(network, tokens(2, 30) % 101, longest=64)
    assert made is not None
    assert made.relative == float("inf")


def test_how_a_model_samples_and_stops_is_left_aside() -> None:
    network = stock("MixtralForCausalLM")
    network.generation_config.update(
        do_sample=True, temperature=9.0, repetition_penalty=3.0, eos_token_id=list(range(101))
    )
    made = compare_generation(network, tokens(2, 30) % 101, longest=64)
    assert made is not None
    assert (made.tokens, made.same) == (16, 16)


Damage = Callable[[str, str], None]


@pytest.fixture
def damage(monkeypatch: pytest.MonkeyPatch) -> Damage:
    """Ship modelling code in which one piece of text is another."""

    def replace(old: str, new: str) -> None:
        def damaged(file_name: str) -> str:
            return shipped_code(file_name).replace(old, new)

        assert any(old in shipped_code(f"modeling_megatron_ext{part}.py") for part in ("", "_attention"))
        for module in (export_module, logits_module):
            monkeypatch.setattr(module, "shipped_code", damaged)

    return replace


def test_an_export_whose_code_loses_the_cache_is_not_published(tmp_path: Path, damage: Damage) -> None:
    """Its logits are right; what transformers 5.24 did to the code before was not seen by them."""
    source = write_checkpoint(tmp_path / "megatron", MODELS["Tanuki with a shared expert"])
    damage("cache=_one_cache(cache, past_key_values)", "cache=None")
    with pytest.raises(ConversionError, match="it would not generate what it computes") as raised:
        convert(source, tmp_path / "hf", hf_class="MegatronExtForCausalLM", verify=Comparison())
    assert "argmax agreement  100.00%" in str(raised.value)
    assert "NOT to be used" in str(raised.value)
    assert not (tmp_path / "hf").exists()


def test_both_orders_are_examined_and_neither_a_source(tmp_path: Path) -> None:
    source, exported = export(tmp_path, "GPT-2 with experts")
    for pair in ((source, exported), (exported, source)):
        done = verify(*pair, Comparison(batches=1, length=24))
        assert done.passed
        assert done.generation is not None
        assert done.generation.tokens == 16
    assert verify(exported, source, Comparison(batches=1, length=24, generation=False)).generation is None
