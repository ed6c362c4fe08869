"""Merging checkpoints of either kind: which ones, what comes out, what is refused."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_ext.canonical.catalogue import EMBEDDING
from megatron_ext.checkpoint.find import checkpoint_name
from megatron_ext.checkpoint.metadata import METADATA_FILE
from megatron_ext.checkpoint.streams import MegatronSink, MegatronSource
from megatron_ext.config import to_mapping
from megatron_ext.errors import CheckpointError, ConfigError, ConversionError
from megatron_ext.merging import average as average_module
from megatron_ext.merging.average import average, sources_of
from megatron_ext.merging.merge import Dare, Ema, Linear, TaskArithmetic, Ties
from megatron_ext.merging.options import AverageOptions
from megatron_ext.model_io import compare as verify
from megatron_ext.model_io.compare import compare_weights
from megatron_ext.model_io.convert import convert
from megatron_ext.model_io.open import open_checkpoint
from megatron_ext.testing.tiny import tiny_model
from tests.support.checkpoints import write_checkpoint

MODEL = tiny_model(moe=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [write_checkpoint(folder / str(number), MODEL, seed=number) for number in range(3)]


def options(sources: list[Path], target: Path, **changes: Any) -> AverageOptions:
    fields: dict[str, Any] = {"logits": False, **changes}
    return AverageOptions(sources=[str(path) for path in sources], target=str(target), **fields)


def test_an_average_is_the_mean_of_every_tensor(models: list[Path], tmp_path: Path) -> None:
    average(options(models[:2], tmp_path / "out", method=Linear(weights=[1.0, 3.0])))
    a, b, out = (MegatronSource(path) for path in (*models[:2], tmp_path / "out"))
    assert out.specs == a.specs
    for name in a.specs:
        expected = 0.25 * a.read(name).double() + 0.75 * b.read(name).double()
        assert torch.equal(out.read(name), expected.float()), name
    assert open_checkpoint(tmp_path / "out").model == MODEL


@pytest.mark.parametrize("method", [Linear(), Ema(), TaskArithmetic(weights=[0.5, 0.5]), Ties(density=1.0)])
def test_equal_models_of_either_kind_give_themselves(method: Any, models: list[Path], tmp_path: Path) -> None:
    convert(models[0], tmp_path / "hf")
    base = str(models[1]) if method.needs_base else None
    average(options([models[0], tmp_path / "hf"], tmp_path / "out", method=method, base=base, to="hf"))
    assert not compare_weights(models[0], tmp_path / "out").different


def test_workers_change_no_bit(models: list[Path], tmp_path: Path) -> None:
    for workers in (1, 4):
        o = options(models[:2], tmp_path / str(workers), method=Dare(), base=str(models[2]), workers=workers)
        average(o)
    assert not compare_weights(tmp_path / "1", tmp_path / "4").different


def test_the_result_is_measured_beside_its_parts(models: list[Path], tmp_path: Path) -> None:
    measured = average(options(models[:2], tmp_path / "out", logits=True)).perplexities
    assert list(measured) == [*(str(open_checkpoint(path).directory) for path in models[:2]), str(tmp_path / "out")]
    assert all(value > 1 for value in measured.values())


def test_the_last_checkpoints_of_a_run(tmp_path: Path) -> None:
    for iteration in (10, 20, 30):
        (tmp_path / checkpoint_name(iteration)).mkdir()
        for name in (METADATA_FILE, "__0_0.distcp"):
            (tmp_path / checkpoint_name(iteration) / name).touch()
    (tmp_path / checkpoint_name(40)).mkdir()
    with pytest.raises(CheckpointError, match="iter_0000040 is not complete"):
        sources_of(options([tmp_path], tmp_path / "out", last=2))
    (tmp_path / checkpoint_name(40)).rmdir()
    found = sources_of(options([tmp_path], tmp_path / "out", last=2))
    assert [path.name for path in found] == ["iter_0000020", "iter_0000030"]
    with pytest.raises(ConfigError, match="--last 4: .* holds 3 checkpoints"):
        sources_of(options([tmp_path], tmp_path / "out", last=4))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"method": Ties()}, "--method ties needs --base"),
        ({"base": "x"}, "--method linear works without --base"),
        ({"seed": 1}, "seed = 1: has no effect with --method linear"),
        ({"text": "t"}, "text = t: has no effect with --no-logits"),
        ({"hf_class": "LlamaForCausalLM"}, "hf_class = LlamaForCausalLM: has no effect with --to megatron"),
    ],
)
def test_an_option_without_effect_is_refused(
    changes: dict[str, Any], complaint: str, models: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        average(options(models, tmp_path / "out", **changes))


def test_what_cannot_be_averaged_is_refused(models: list[Path], tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", replace(MODEL, rotary_base=5e5))
    with pytest.raises(ConversionError, match=r"rotary_base is 10000.0 in .*, 500000.0 in"):
        average(options([models[0], other], tmp_path / "out"))
    with pytest.raises(ConfigError, match="give two models or more"):
        average(options(models[:1], tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_taken_target_and_short_memory_are_found_before_the_work(
    models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: Any, **named: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(average_module, "checkpoint_logits", never)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").touch()
    with pytest.raises(ConversionError, match="not empty"):
        average(options(models[:2], tmp_path / "out", logits=True))
    monkeypatch.setattr(verify.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(ConversionError, match="its logits need the model in fp32"):
        average(options(models[:2], tmp_path / "other", logits=True))


def with_nan(source: Path, target: Path) -> Path:
    """A copy in which one weight is not a number."""
    read = MegatronSource(source)
    with MegatronSink(target, read.specs, {"model": to_mapping(MODEL)}) as sink:
        for name in read.specs:
            tensor = read.read(name).clone()
            if name == "decoder.final_layernorm.weight":
                tensor[3] = float("nan")
            sink.write(name, tensor)
    return target


@pytest.mark.parametrize("logits", [True, False])
@pytest.mark.parametrize("method", [Linear(), Ties()])
def test_a_source_that_is_not_a_number_is_an_error(
    method: Any, logits: bool, models: list[Path], tmp_path: Path
) -> None:
    bad = with_nan(models[0], tmp_path / "bad")
    base = str(models[2]) if method.needs_base else None
    complaint = "bad.*its logits are not numbers" if logits else "final_layernorm.weight: merged, it holds NaN or Inf"
    with pytest.raises(ConversionError, match=complaint):
        average(options([models[1], bad], tmp_path / "out", method=method, base=base, logits=logits))
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_weights_are_counted_before_anything_is_opened(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="3 weights for 2 models"):
        average(options([tmp_path / "a", tmp_path / "b"], tmp_path / "out", method=Linear(weights=[1.0, 2.0, 3.0])))


def test_padding_of_the_vocabulary_has_no_share_of_what_ties_keeps(tmp_path: Path) -> None:
    """Two models that differ everywhere, once padded by 62 rows and once by two: the tokens' rows come out alike."""
    results = []
    for divisor in (64, 2):
        model = tiny_model(vocab_size=130, make_vocab_size_divisible_by=divisor)
        paths = [write_checkpoint(tmp_path / f"{divisor}.{seed}", model, seed=seed) for seed in range(2)]
        target = tmp_path / f"{divisor}.out"
        average(options(paths[:1], target, method=Ties(density=0.3), base=str(paths[1])))
        base, merged = (MegatronSource(path).read(EMBEDDING)[:130] for path in (paths[1], target))
        results.append(float((base != merged).float().mean()))
    assert results == [pytest.approx(0.3, abs=1e-4)] * 2


def test_a_merge_of_hugging_face_models_stays_of_their_class(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "dense", tiny_model())
    convert(source, tmp_path / "hf", hf_class="MistralForCausalLM")
    average(options([tmp_path / "hf", tmp_path / "hf"], tmp_path / "out", to="hf"))
    architecture = open_checkpoint(tmp_path / "out").architecture
    assert architecture is not None
    assert architecture.hf_class == "MistralForCausalLM"
    assert "| made of | linear of hf, hf |" in (tmp_path / "out" / "README.md").read_text()
