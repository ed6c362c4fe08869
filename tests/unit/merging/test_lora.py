"""Merging adapters: the sums of published examples, what rounding loses, and what is refused."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ext.canonical.adapters import AdapterPair
from megatron_ext.canonical.catalogue import EMBEDDING
from megatron_ext.checkpoint.streams import MegatronSource, TensorSpec
from megatron_ext.config import LoraConfig, LoraTarget
from megatron_ext.errors import CheckpointError, ConversionError
from megatron_ext.merging.lora import MUCH, RECORD, merge_lora, silent
from megatron_ext.merging.lora_options import MergeLoraOptions
from megatron_ext.model_io.adapters import open_adapters, weight_delta
from megatron_ext.model_io.compare import compare_weights
from megatron_ext.model_io.convert import convert
from megatron_ext.model_io.open import open_checkpoint
from megatron_ext.testing.tiny import tiny_model
from tests.support.checkpoints import write_checkpoint
from tests.unit.model_io.drawn_adapters import write_drawn
from tools import merge_lora as merge_lora_command

MODEL = tiny_model(moe=True)
ADAPTERS = LoraConfig(targets=[LoraTarget(match=["*"], rank=4, alpha=8.0)])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base") / "base", MODEL)


def merge(adapters: Path, target: Path, **changes: Any) -> Any:
    return merge_lora(MergeLoraOptions(adapters=str(adapters), target=str(target), **changes), silent)


class Given:
    """Two halves, by hand."""

    def __init__(self, a: list[list[float]], b: list[list[float]]) -> None:
        self._halves = {"A": torch.tensor(a), "B": torch.tensor(b)}
        self.specs: dict[str, TensorSpec] = {}

    def read(self, name: str) -> Tensor:
        return self._halves[name[-1]]


WEIGHT = torch.tensor([[1.0, 2], [3, 4], [5, 6]])
EYE = [[1.0, 0], [0, 1]]


@pytest.mark.parametrize(
    ("a", "b", "target", "rslora", "expected"),
    [
        ([[1.0, -1]], [[2.0], [0], [-4]], (1, 2.0), False, [[5.0, -2], [3, 4], [-3, 14]]),
        (EYE, [[1.0, 1], [0, 2], [-1, 0]], (2, 8.0), False, [[5.0, 6], [3, 12], [1, 6]]),
        (EYE, [[1.0, 1], [0, 2], [-1, 0]], (2, 8.0), True, [[6.656854, 7.656854], [3, 15.313708], [-0.656854, 6]]),
    ],
    ids=["rank 1", "rank 2", "rsLoRA"],
)
def test_sums_by_hand(a: Any, b: Any, target: tuple[int, float], rslora: bool, expected: list[list[float]]) -> None:
    rank, alpha = target
    scale = LoraConfig(use_rslora=rslora).scale(LoraTarget(rank=rank, alpha=alpha))
    # Tensor parallelism, layer: neither matters here.
    pair = AdapterPair("x.linear_proj.weight", "o", rank, scale, 2, 3, None, None, False)
    delta = weight_delta(MODEL, pair.weight, [pair], Given(a, b))
    assert torch.allclose(WEIGHT + delta, torch.tensor(expected), atol=1e-5)


class Rows(Given):
    """B's rows numbered by projection, beside an A of ones."""

    def read(self, name: str) -> Tensor:
        first, count = {"q": (1, 8), "k": (101, 4), "v": (201, 4)}[name[-3]]
        rows = torch.arange(first, first + count, dtype=torch.float32)
        return torch.ones(1, 8) if name.endswith("A") else rows[:, None]


def test_projections_stand_where_megatron_has_them() -> None:
    """4 heads of width 2 in 2 groups, rank 1: they come out group by group."""
    model = tiny_model(num_layers=1, hidden_size=8, kv_channels=2)
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    pairs = [AdapterPair(name, p, 1, 1.0, 8, 8 if p == "q" else 4, 0, 0, False) for p in "qkv"]
    delta = weight_delta(model, name, pairs, Rows([], []))
    expected = [1, 2, 3, 4, 101, 102, 201, 202, 5, 6, 7, 8, 103, 104, 203, 204]
    assert delta[:, 0].tolist() == expected
    alone = weight_delta(model, name, pairs[1:2], Rows([], []))
    assert alone[:, 0].tolist() == [n if 100 < n < 200 else 0 for n in expected]


def test_every_weight_gets_its_own_and_no_other(base: Path, tmp_path: Path) -> None:
    targets = [LoraTarget(match=["layers.2.*", "embedding.*", "k"], rank=4, alpha=8.0)]
    made = merge(write_drawn(base, tmp_path / "adapters", replace(ADAPTERS, targets=targets)), tmp_path / "merged")
    before, after = MegatronSource(base), MegatronSource(tmp_path / "merged")
    changed = {name for name in before.specs if not torch.equal(before.read(name), after.read(name))}
    pairs = open_adapters(tmp_path / "adapters").pairs
    assert changed == {pair.weight for pair in pairs}
    assert EMBEDDING in changed
    assert made.pairs == len(pairs)
    assert after.specs == before.specs
    assert made.worst < 1e-5


def test_zero_adapters_change_no_bit(base: Path, tmp_path: Path) -> None:
    merge(write_drawn(base, tmp_path / "adapters", ADAPTERS, std=0.0), tmp_path / "merged")
    assert not compare_weights(base, tmp_path / "merged").different


def test_what_bf16_loses_is_told(base: Path, tmp_path: Path) -> None:
    """Of differences of 0.05 % of the weights 0.90, of differences of 5 % 0.033."""
    convert(base, tmp_path / "bf16", to="megatron", dtype="bf16")
    weights = MegatronSource(base).read("decoder.layers.0.self_attention.linear_qkv.weight").std()
    losses = {}
    for share in (5e-4, 5e-2):
        delta = float(share * weights)
        # Two halves of rank 4 and scale 2 in width 64: the sum's deviation is half that of B.
        adapters = write_drawn(tmp_path / "bf16", tmp_path / f"adapters {share}", ADAPTERS, std=2 * delta)
        losses[share] = merge(adapters, tmp_path / f"merged {share}").losses["self_attention.linear_qkv"]
    print(losses)
    assert losses[5e-4] == pytest.approx(0.90, abs=0.05)
    assert losses[5e-2] == pytest.approx(0.033, abs=0.01)
    assert losses[5e-2] < MUCH < losses[5e-4]
    exact = merge(tmp_path / "adapters 0.0005", tmp_path / "exact", dtype="fp32")
    assert exact.worst < 1e-3
    assert MegatronSource(tmp_path / "exact").specs[EMBEDDING].dtype is torch.float32


def test_the_command_warns_of_what_is_lost_above_a_fifth(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_drawn(base, tmp_path / "adapters", ADAPTERS, std=1e-4)
    for dtype, warned in (("bf16", True), ("fp32", False)):
        monkeypatch.setattr("sys.argv", ["x", str(tmp_path / "adapters"), str(tmp_path / dtype), "--dtype", dtype])
        merge_lora_command.main()
        said = capsys.readouterr().out
        assert len(re.findall(r"lost by rounding +[0-9.]+%  ", said)) >= 5
        assert ("warning: rounding has lost up to" in said) == warned


def test_adapters_are_not_merged_twice_nor_into_others(base: Path, tmp_path: Path) -> None:
    adapters = write_drawn(base, tmp_path / "adapters", ADAPTERS)
    merge(adapters, tmp_path / "merged", workers=4)
    record = open_checkpoint(tmp_path / "merged").run[RECORD]
    assert [one["fingerprint"] for one in record] == [open_adapters(adapters).fingerprint]
    with pytest.raises(ConversionError, match="has these adapters merged into it already"):
        merge(adapters, tmp_path / "twice", base=str(tmp_path / "merged"))
    convert(tmp_path / "merged", tmp_path / "hf")
    with pytest.raises(ConversionError, match="holds other weights"):
        merge(adapters, tmp_path / "twice", base=str(tmp_path / "hf"))
    assert not (tmp_path / "twice").exists()
    with pytest.raises(CheckpointError, match="holds a whole model, and no adapters"):
        merge(base, tmp_path / "twice")
    with pytest.raises(CheckpointError, match=r"holds adapters alone.*tools/merge_lora\.py"):
        convert(adapters, tmp_path / "twice")


def test_any_form_of_the_base_will_do(base: Path, tmp_path: Path) -> None:
    convert(base, tmp_path / "hf")
    adapters = write_drawn(base, tmp_path / "adapters", ADAPTERS)
    merge(adapters, tmp_path / "merged")
    merge(adapters, tmp_path / "merged hf", base=str(tmp_path / "hf"), to="hf")
    assert not compare_weights(tmp_path / "merged", tmp_path / "merged hf").different
