"""What cannot be upcycled, or has no place to go, is refused before the work and leaves nothing."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_ext.canonical.catalogue import model_shapes
from megatron_ext.checkpoint.streams import MegatronSink, TensorSpec
from megatron_ext.config import to_mapping
from megatron_ext.errors import ConfigError, ConversionError, DataError
from megatron_ext.model_io import compare as verify
from megatron_ext.upcycling.methods.drop import Drop
from megatron_ext.upcycling.methods.fine_grained import FineGrained
from megatron_ext.upcycling.methods.mix import Mix
from megatron_ext.upcycling.plan import make_plan
from megatron_ext.upcycling.run import upcycle
from tests.support.checkpoints import write_checkpoint
from tests.unit.upcycling.models import DENSE, options


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"expert_size": 48}, "moe_ffn_hidden_size = 48: copying needs experts of the dense layer's width, 96"),
        ({"topk": 9}, "model.moe_router_topk = 9, model.num_moe_experts = 4"),
        ({"topk": 1}, "set moe_router_pre_softmax: true"),
        ({"method": Mix()}, "sources: 1 given; --method mix takes two or more"),
        ({"first_k_dense": 4}, "first_k_dense = 4, layer_freq = 1: leave none of the 4 layers to become MoE"),
        ({"method": FineGrained(granularity=2, scale="paper"), "topk": 2}, "pass --no-gating-normalization"),
        ({"num_experts": None}, "num_experts: required, but where --layers alone"),
        ({"num_experts": None, "layers": "0-3"}, "shared_expert_size = 40: has no effect without num_experts"),
        ({"method": Drop(), "tolerance": 1e-3}, "tolerance = 0.001: has no effect, since the function changes"),
    ],
)
def test_a_model_that_cannot_be_made_is_refused_and_nothing_is_written(
    changes: dict[str, Any], complaint: str, dense: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as error:
        make_plan(options(dense["grouped-query, untied"], tmp_path / "moe", **changes))
    assert complaint in str(error.value)
    assert not (tmp_path / "moe").exists()


def test_sources_that_do_not_go_together_are_refused(dense: dict[str, Path], tmp_path: Path) -> None:
    first, other = dense["grouped-query, untied"], write_checkpoint(tmp_path / "x", replace(DENSE, rotary_base=5e5))
    with pytest.raises(ConversionError, match="rotary_base is 10000.0 in .*, 500000.0 in"):
        make_plan(options([first, other], tmp_path / "moe", method=Mix()))
    with pytest.raises(ConfigError, match="takes one"):
        make_plan(options([first, other], tmp_path / "moe"))
    with pytest.raises(ConfigError, match="num_experts = 4: must be a multiple of the 3 sources"):
        make_plan(options([first] * 3, tmp_path / "moe", method=Mix()))
    with pytest.raises(ConfigError, match=r"source_weights = \[1.0, -1.0\]: sum to 0"):
        make_plan(options([first] * 2, tmp_path / "moe", method=Mix(source_weights=[1.0, -1.0])))


def test_a_moe_source_is_refused(dense: dict[str, Path], tmp_path: Path) -> None:
    upcycle(make_plan(options(dense["grouped-query, untied"], tmp_path / "moe", logits=False)))
    with pytest.raises(ConfigError, match="the source is a MoE model already"):
        make_plan(options(tmp_path / "moe", tmp_path / "x"))


def test_an_existing_target_is_kept_unless_forced(dense: dict[str, Path], tmp_path: Path) -> None:
    source = dense["grouped-query, untied"]

    def again(**changes: Any) -> None:
        upcycle(make_plan(options(source, tmp_path / "moe", logits=False, **changes)))

    again(seed=1)
    with pytest.raises(ConversionError, match="not empty"):
        again(seed=2)
    (tmp_path / "moe").rename(tmp_path / "aside")
    with pytest.raises(ConversionError, match="moe.yaml exists"):
        again(seed=2)
    (tmp_path / "aside").rename(tmp_path / "moe")
    again(seed=2, force=True)
    (tmp_path / "moe.yaml").write_text("mine: true\n")
    with pytest.raises(ConversionError, match="not replaced, even with --force"):
        again(seed=3, force=True)
    assert (tmp_path / "moe.yaml").read_text() == "mine: true\n"


def test_places_beside_the_target_are_looked_at_before_the_work(dense: dict[str, Path], tmp_path: Path) -> None:
    source = dense["grouped-query, untied"]
    with pytest.raises(ConversionError, match="is a directory; name a file in it"):
        upcycle(make_plan(options(source, tmp_path / "moe", figures=str(tmp_path))))
    (tmp_path / "moe.yaml").mkdir()
    with pytest.raises(ConversionError, match="not replaced, even with --force"):
        upcycle(make_plan(options(source, tmp_path / "moe", force=True)))
    assert [path.name for path in tmp_path.iterdir()] == ["moe.yaml"]


def test_a_target_needs_a_name(dense: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for nameless in ("", "/"):
        with pytest.raises(ConfigError, match="give the name of a directory to write"):
            make_plan(options(dense["tied"], nameless))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert make_plan(options(dense["tied"], ".")).options.target == str(tmp_path / "here")


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_routers_that_cannot_choose_are_refused(dtype: str, dense: dict[str, Path], tmp_path: Path) -> None:
    """1e-12 is zero in fp16, and a router of zeros would be divided by its deviation."""
    plan = make_plan(options(dense["tied"], tmp_path / "moe", router_std=1e-12, dtype=dtype, logits=False))
    if dtype == "fp16":
        with pytest.raises(DataError, match="does not tell experts apart in torch.float16: router_std is too small"):
            upcycle(plan)
        assert list(tmp_path.iterdir()) == []
    else:
        upcycle(plan)


@pytest.mark.parametrize("logits", [True, False])
def test_a_dense_model_that_diverged_is_named(logits: bool, tmp_path: Path) -> None:
    with MegatronSink(
        tmp_path / "dense",
        {n: TensorSpec(s, torch.float32) for n, s in model_shapes(DENSE).items()},
        {"model": to_mapping(DENSE)},
    ) as sink:
        for name, shape in model_shapes(DENSE).items():
            sink.write(name, torch.full(shape, math.nan if name == "decoder.final_layernorm.weight" else 1.0))
    with pytest.raises(ConversionError, match=r"dense: 1 of \d+ tensors hold NaN .*decoder\.final_layernorm\.weight"):
        upcycle(make_plan(options(tmp_path / "dense", tmp_path / "moe", router_std=None, logits=logits)))
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"router_init": "activations"}, "router_init = activations: needs --text"),
        ({"router_init": "activations", "text": "t"}, "router_std = 1.0: has no effect"),
        ({"text": "t", "logits": False}, "text = t: has no effect with --no-logits"),
        ({"figures": "f", "logits": False}, "figures = f: has no effect with --no-logits"),
        ({"figures": "f", "check": True}, "figures = f: has no effect with --check"),
        ({"tolerance": 1e-3, "logits": False}, "tolerance = 0.001: has no effect with --no-logits"),
    ],
)
def test_an_option_without_effect_is_refused(
    changes: dict[str, Any], complaint: str, dense: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        make_plan(options(dense["grouped-query, untied"], tmp_path / "moe", **changes))


def test_short_memory_is_found_before_the_work(
    dense: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(ConversionError, match="its logits need the model in fp32"):
        upcycle(make_plan(options(dense["tied"], tmp_path / "moe")))
    assert list(tmp_path.iterdir()) == []
