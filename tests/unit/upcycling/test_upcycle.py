"""Upcycling whole models: what is copied, what is drawn, and that the function is kept, measured on logits."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_ext.canonical.catalogue import model_shapes
from megatron_ext.checkpoint.streams import MegatronSink, MegatronSource, TensorSpec
from megatron_ext.config import load_run, to_mapping
from megatron_ext.config.load import read_yaml
from megatron_ext.data.tokenizer import train_tokenizer
from megatron_ext.errors import ConfigError, ConversionError, DataError
from megatron_ext.model_io.checkpoint_model import read_model
from megatron_ext.model_io.compare import checkpoint_logits, compare_logits, compare_weights
from megatron_ext.model_io.convert import convert
from megatron_ext.model_io.open import open_checkpoint
from megatron_ext.model_io.text import comparison_batches
from megatron_ext.upcycling.depth import deepened_model, parse_layers
from megatron_ext.upcycling.describe import describe_plan
from megatron_ext.upcycling.methods.copy import Copy
from megatron_ext.upcycling.methods.drop import Drop
from megatron_ext.upcycling.methods.fine_grained import FineGrained
from megatron_ext.upcycling.methods.mix import Mix
from megatron_ext.upcycling.methods.shared_routed import SharedRouted
from megatron_ext.upcycling.plan import make_plan
from megatron_ext.upcycling.run import upcycle
from tests.support.checkpoints import write_checkpoint
from tests.support.workspace import write_corpus
from tests.unit.upcycling.models import DENSE, DENSE_MODELS, EXPERTS, TOLERANCE, made, options

METHODS: dict[str, dict[str, Any]] = {
    "copy": {"method": Copy()},
    "copy, sigmoid and a gated shared expert": {"score_function": "sigmoid", "shared_expert_gate": True},
    "fine-grained": {"method": FineGrained(granularity=2), "num_experts": 8, "topk": 4},
    "shared and routed": {"method": SharedRouted(granularity=4), "num_experts": 8, "topk": 4, "shared_expert_size": 32},
    "another factor": {"method": FineGrained(granularity=2), "num_experts": 8, "topk": 4, "scaling_factor": 2.5},
    "every second layer": {"layer_freq": 2, "first_k_dense": 0, "gating_normalization": False},
}


@pytest.mark.parametrize("model", DENSE_MODELS)
@pytest.mark.parametrize("name", METHODS)
def test_the_function_is_kept_whatever_the_router_says(
    name: str, model: str, dense: dict[str, Path], tmp_path: Path
) -> None:
    for seed in (1, 2, 3):
        function = made(options(dense[model], tmp_path / str(seed), seed=seed, **METHODS[name]))
        print(f"{name}, {model}, seed {seed}: {function.logits.relative:.1e} of the logits' scale")
        assert function.logits.relative <= TOLERANCE
        assert function.moe_perplexity == pytest.approx(function.dense_perplexity, rel=1e-5)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "another factor"])
def test_in_bf16_it_is_the_dense_model_in_bf16(name: str, dense: dict[str, Path], tmp_path: Path) -> None:
    """No more is lost than rounding the dense weights loses: factors of these methods are powers of two."""
    source = dense["grouped-query, untied"]
    o = options(source, tmp_path / "moe", dtype="bf16", **METHODS[name])
    assert "kept, up to the rounding of fp32, with weights rounded to bfloat16" in make_plan(o).expectation
    function = made(o)
    batches = comparison_batches(source, None, None)
    in_bf16 = checkpoint_logits(source, batches, weights_as=torch.bfloat16)
    rounded = compare_logits(checkpoint_logits(source, batches), in_bf16)
    apart = compare_logits(in_bf16, checkpoint_logits(tmp_path / "moe", batches))
    print(
        f"{name}: {function.logits.relative:.1e} from fp32, as dense in bf16 is ({rounded.relative:.1e}); the two are "
        f"{apart.relative:.1e} apart, argmax agreement {apart.argmax_agreement:.2%}"
    )
    assert function.logits.relative == pytest.approx(rounded.relative, rel=1e-3)
    assert apart.relative <= TOLERANCE
    assert apart.argmax_agreement >= 0.99


def test_source_format_and_workers_change_no_bit(dense: dict[str, Path], tmp_path: Path) -> None:
    source = dense["grouped-query, untied"]
    convert(source, tmp_path / "hf")
    settings: dict[str, Any] = {"method": Drop(), "router_std": 0.1, "logits": False}
    upcycle(make_plan(options(source, tmp_path / "a", workers=1, **settings)))
    upcycle(make_plan(options(tmp_path / "hf", tmp_path / "b", workers=4, **settings)))
    comparison = compare_weights(tmp_path / "a", tmp_path / "b")
    assert comparison.tensors == len(model_shapes(read_model(tmp_path / "a")))
    assert not comparison.different


@pytest.mark.parametrize("name", METHODS)
def test_a_hugging_face_model_becomes_a_hugging_face_moe(name: str, dense: dict[str, Path], tmp_path: Path) -> None:
    """Both computed by transformers."""
    convert(dense["tied"], tmp_path / "hf")
    function = made(options(tmp_path / "hf", tmp_path / "moe", to="hf", **METHODS[name]))
    print(f"{name}: {function.logits.relative:.1e} of the logits' scale")
    assert function.logits.relative <= TOLERANCE
    assert open_checkpoint(tmp_path / "moe").model.is_moe
    assert not (tmp_path / "moe.yaml").exists()
    assert "| made of | hf, upcycled by" in (tmp_path / "moe" / "README.md").read_text()


def test_a_megatron_checkpoint_becomes_a_hugging_face_moe(dense: dict[str, Path], tmp_path: Path) -> None:
    function = made(options(dense["GPT-2"], tmp_path / "moe", to="hf"))
    print(f"Megatron to Hugging Face: {function.logits.relative:.1e} of the logits' scale")
    assert function.logits.relative <= TOLERANCE


def test_experts_are_the_dense_layer_and_the_shared_expert_is_silent(dense: dict[str, Path], tmp_path: Path) -> None:
    source = dense["grouped-query, untied"]
    upcycle(make_plan(options(source, tmp_path / "moe", shared_expert_size=120, logits=False)))
    before, after = MegatronSource(source), MegatronSource(tmp_path / "moe")
    moe = read_model(tmp_path / "moe")
    assert {name: spec.shape for name, spec in after.specs.items()} == model_shapes(moe)
    for name in before.specs:
        if ".mlp.linear_fc" not in name or "layers.0." in name:
            assert torch.equal(before.read(name), after.read(name)), name
    for layer in (1, 2, 3):
        prefix = f"decoder.layers.{layer}.mlp"
        for matrix in ("linear_fc1.weight", "linear_fc2.weight"):
            ffn = before.read(f"{prefix}.{matrix}")
            assert all(torch.equal(after.read(f"{prefix}.experts.{e}.{matrix}"), ffn) for e in range(4))
        assert not after.read(f"{prefix}.shared_experts.linear_fc2.weight").any()
        gate, up = after.read(f"{prefix}.shared_experts.linear_fc1.weight").chunk(2)
        dense_gate, dense_up = before.read(f"{prefix}.linear_fc1.weight").chunk(2)
        assert torch.equal(gate, torch.cat((dense_gate, dense_gate[:24])))
        assert torch.equal(up, torch.cat((dense_up, dense_up[:24])))


def test_routers_follow_the_seed_alone(dense: dict[str, Path], tmp_path: Path) -> None:
    names = ["decoder.layers.1.mlp.router.weight", "decoder.layers.2.mlp.router.weight"]

    def routers(target: str, **changes: Any) -> list[Tensor]:
        source = dense["grouped-query, untied"]
        upcycle(make_plan(options(source, tmp_path / target, logits=False, **changes)))
        return [MegatronSource(tmp_path / target).read(name) for name in names]

    first, again = routers("a", seed=1), routers("b", seed=1, shared_expert_size=None)
    other = routers("c", seed=2)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], first[1])
    assert float(first[0].std()) == pytest.approx(1.0, rel=0.2)


def test_several_models_become_experts_and_an_average(tmp_path: Path) -> None:
    sources = [write_checkpoint(tmp_path / str(number), DENSE) for number in range(2)]
    same = made(options(sources, tmp_path / "same", method=Mix(shared_experts="average"), shared_expert_size=96))
    print(f"mix of equal models: {same.logits.relative:.1e} of the logits' scale")
    assert same.logits.relative <= TOLERANCE


def test_what_is_not_an_expert_is_the_weighted_average(tmp_path: Path) -> None:
    sources = [write_checkpoint(tmp_path / str(number), DENSE, seed=number) for number in range(2)]
    upcycle(make_plan(options(sources, tmp_path / "moe", method=Mix(source_weights=[1.0, 3.0]), logits=False)))
    a, b, moe = (MegatronSource(path) for path in (*sources, tmp_path / "moe"))
    for name in ("embedding.word_embeddings.weight", "decoder.layers.0.mlp.linear_fc1.weight", "output_layer.weight"):
        expected = (a.read(name).double() + 3 * b.read(name).double()) / 4
        assert torch.equal(moe.read(name), expected.float()), name
    for expert, source in enumerate((a, a, b, b)):
        name = "decoder.layers.1.mlp.{}linear_fc1.weight"
        assert torch.equal(moe.read(name.format(f"experts.{expert}.")), source.read(name.format("")))


def test_depth_comes_from_repeated_layers(dense: dict[str, Path], tmp_path: Path) -> None:
    source = dense["grouped-query, untied"]
    upcycle(make_plan(options(source, tmp_path / "moe", layers="0-2,1-3", logits=False)))
    before, after = MegatronSource(source), MegatronSource(tmp_path / "moe")
    assert read_model(tmp_path / "moe").num_layers == 6
    for layer, origin in enumerate((0, 1, 2, 1, 2, 3)):
        name = "decoder.layers.{}.self_attention.linear_qkv.weight"
        assert torch.equal(after.read(name.format(layer)), before.read(name.format(origin)))
    with pytest.raises(ConfigError, match=r"'2-4' is no layer or range of layers of a model with 4"):
        parse_layers("0-2,2-4", 4)
    assert deepened_model(DENSE, [0, 0]).num_layers == 2
    windows = replace(DENSE, sliding_window=9, window_attn_skip_freq=2)
    assert deepened_model(windows, [0, 1, 1, 2]).window_layer_pattern == [True, False, False, True]


@pytest.mark.parametrize("layers", ["0-2,1-3", "0-3"])
def test_a_deeper_model_keeps_its_function_as_a_moe(layers: str, dense: dict[str, Path], tmp_path: Path) -> None:
    function = made(options(dense["grouped-query, untied"], tmp_path / "moe", layers=layers))
    print(f"layers {layers}: {function.logits.relative:.1e} of the logits' scale of the dense model with these layers")
    assert function.logits.relative <= TOLERANCE


@pytest.mark.parametrize("first_k_dense", [0, 1])
def test_a_moe_model_is_made_deeper(first_k_dense: int, dense: dict[str, Path], tmp_path: Path) -> None:
    source = dense["grouped-query, untied"]
    upcycle(make_plan(options(source, tmp_path / "moe", first_k_dense=first_k_dense, logits=False)))
    alone = {**dict.fromkeys(EXPERTS), "first_k_dense": 0}
    assert made(options(tmp_path / "moe", tmp_path / "deep", layers="0-3,2-3", **alone)).logits.relative == 0
    assert read_model(tmp_path / "deep").moe_layer_pattern == [first_k_dense == 0] + [True] * 5
    before, after = MegatronSource(tmp_path / "moe"), MegatronSource(tmp_path / "deep")
    name = "decoder.layers.{}.mlp.router.weight"
    assert torch.equal(after.read(name.format(4)), before.read(name.format(2)))


def test_depth_alone_makes_a_deeper_dense_model(dense: dict[str, Path], tmp_path: Path) -> None:
    """It is the model that two steps are: what the first writes, upcycled, is what one step with both makes."""
    source, alone = dense["grouped-query, untied"], dict.fromkeys(EXPERTS)
    first = options(source, tmp_path / "deep", layers="0-2,1-3", **{**alone, "first_k_dense": 0})
    assert made(first).logits.relative == 0
    assert not read_model(tmp_path / "deep").is_moe
    run = load_run(tmp_path / "deep.yaml")
    assert run.model == read_model(tmp_path / "deep")
    upcycle(make_plan(options(tmp_path / "deep", tmp_path / "two", logits=False)))
    upcycle(make_plan(options(source, tmp_path / "one", layers="0-2,1-3", logits=False)))
    assert not compare_weights(tmp_path / "one", tmp_path / "two").different


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pre_softmax": True}, "do not sum to a constant"),
        ({"scaling_factor": 3.0, "dtype": "bf16"}, "a factor 0.3333 goes into the experts' output weights"),
        ({}, None),
        ({"scaling_factor": 3.0}, None),
        ({"layers": "0-3,0-3"}, None),
        ({"dtype": "bf16"}, None),
    ],
)
def test_a_plan_says_when_the_function_changes(
    changes: dict[str, Any], reason: str | None, dense: dict[str, Path], tmp_path: Path
) -> None:
    stated = make_plan(options(dense["grouped-query, untied"], tmp_path, **changes)).inexact
    assert stated == reason if reason is None else reason in str(stated)


def test_a_plan_names_the_origin_of_every_tensor(dense: dict[str, Path], tmp_path: Path) -> None:
    text = describe_plan(make_plan(options(dense["grouped-query, untied"], tmp_path / "moe")))
    print(text)
    assert (
        "decoder.layers.{1-3}.mlp.experts.{0-3}.linear_fc1.weight  <-  decoder.layers.*.mlp.linear_fc1.weight" in text
    )
    assert "decoder.layers.0.mlp.linear_fc2.weight" not in text, "layers are counted in ranges"
    assert "decoder.layers.{0}.mlp.linear_fc2.weight  <-  decoder.layers.*.mlp.linear_fc2.weight" in text
    assert "decoder.layers.{1-3}.mlp.router.weight  <-  made by router_init" in text
    assert "shared_experts.linear_fc2.weight  <-  decoder.layers.*.mlp.linear_fc2.weight: repeated or cut" in text
    assert "kept, up to the rounding of fp32" in text
    assert not (tmp_path / "moe").exists()
    (tmp_path / "moe").mkdir()
    (tmp_path / "moe" / "notes.txt").touch()
    half = describe_plan(make_plan(options(dense["tied"], tmp_path / "moe", method=Drop())))
    assert "linear_fc2.weight: 50% of each expert's neurons are new" in half
    assert "moe is not empty" in half or "exists" in half


def test_a_changed_function_is_an_error_where_it_should_be_kept(dense: dict[str, Path], tmp_path: Path) -> None:
    """The check can fail: a method that does not keep the function, passed off as one that does."""
    plan = make_plan(options(dense["grouped-query, untied"], tmp_path / "moe", pre_softmax=True))
    with pytest.raises(ConversionError, match="does not compute what .* does"):
        upcycle(replace(plan, inexact=None))
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_the_training_configuration_beside_is_a_run(dense: dict[str, Path], tmp_path: Path) -> None:
    upcycle(make_plan(options(dense["grouped-query, untied"], f"{tmp_path}/moe/", logits=False)))
    run = load_run(tmp_path / "moe.yaml")
    assert run.model == replace(read_model(tmp_path / "moe"), moe_aux_loss_coeff=1e-2)
    assert run.checkpoint.initialize_from == str(tmp_path / "moe")
    assert run.checkpoint.directory == str(tmp_path / "moe-trained")
    assert run.schedule.kind == "cosine"


RUN = {
    "train": {"train_iters": 500, "global_batch_size": 8, "micro_batch_size": 2, "seed": 5},
    "optimizer": {"kind": "adam", "lr": 4e-4},
    "schedule": {"kind": "constant"},
    "data": {"sequence_length": 32, "tokenizer": "T", "cache_dir": "C", "train": [{"path": "D"}]},
    "checkpoint": {"directory": "R", "save_interval": 50},
}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"precision": {"kind": "fp32"}}, {"precision": {"kind": "fp32"}}),
        # MoE layers under tensor parallelism need sequence parallelism; the rest of the layout stays.
        (
            {"precision": {"kind": "fp32"}, "parallel": {"tensor_model_parallel_size": 2}},
            {
                "precision": {"kind": "fp32"},
                "parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
            },
        ),
    ],
)
def test_the_training_configuration_is_the_dense_models_run(
    settings: dict[str, Any], expected: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = write_checkpoint(tmp_path / "dense", DENSE, run={**RUN, **settings})
    made = upcycle(make_plan(options(source, tmp_path / "moe", logits=False)))
    text = (tmp_path / "moe.yaml").read_text()
    run = read_yaml(tmp_path / "moe.yaml")
    assert {name: run[name] for name in expected} == expected
    # The data is what the dense model has seen: in its order it would be read again.
    assert run["train"] == {**RUN["train"], "seed": 1005}
    assert made.notes == [
        "train.seed is 1005: with the source's, 5, the same samples would be read again from the first"
    ]
    assert "# train.seed is 1005" in text
    assert run["optimizer"]["lr"] == 4e-4
    assert run["schedule"] == {"kind": "cosine", "warmup_iters": 5, "min_lr": pytest.approx(4e-5)}
    changed = "parallel" in settings
    assert ("# The source's run has {'tensor_model_parallel_size': 2}" in text) == changed
    assert ("the training configuration changes parallel" in caplog.text) == changed


def test_biases_of_the_router_start_at_zero(dense: dict[str, Path], tmp_path: Path) -> None:
    biases = {"score_function": "sigmoid", "expert_bias": True, "router_bias": True}
    function = made(options(dense["tied"], tmp_path / "moe", **biases))
    assert function.logits.relative <= TOLERANCE
    for name in ("expert_bias", "bias"):
        assert not MegatronSource(tmp_path / "moe").read(f"decoder.layers.1.mlp.router.{name}").any()
    assert load_run(tmp_path / "moe.yaml").model.moe_aux_loss_coeff == 0


@pytest.fixture(scope="module")
def worded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model with its tokenizer, and text beside it."""
    folder = tmp_path_factory.mktemp("worded")
    corpus = write_corpus(folder / "corpus.jsonl")
    train_tokenizer([corpus], folder / "tokenizer", 330)
    write_corpus(folder / "short.jsonl", documents=12)
    write_checkpoint(folder / "dense", replace(DENSE, vocab_size=330))
    return folder


def test_routers_from_activations_do_not_depend_on_the_source_and_use_all_the_text(
    worded: Path, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "num_experts": 128,
        "router_init": "activations",
        "router_std": None,
        "text": str(worded / "corpus.jsonl"),
        "tokenizer": str(worded / "tokenizer"),
        "logits": False,
    }
    convert(worded / "dense", tmp_path / "hf")
    upcycle(make_plan(options(worded / "dense", tmp_path / "a", **settings)))
    upcycle(make_plan(options(tmp_path / "hf", tmp_path / "b", **settings)))
    assert not compare_weights(tmp_path / "a", tmp_path / "b").different
    weight = MegatronSource(tmp_path / "a").read("decoder.layers.1.mlp.router.weight")
    assert len(weight.unique(dim=0)) == 128
    short = make_plan(options(worded / "dense", tmp_path / "c", **{**settings, "text": str(worded / "short.jsonl")}))
    with pytest.raises(DataError, match="128 clusters need 4096 tokens of text, and --text has"):
        upcycle(short)


def test_what_is_not_made_anew_keeps_its_dtype(tmp_path: Path) -> None:
    """bf16 matrices beside fp32 norms, as some models have them."""
    shapes = model_shapes(DENSE)
    specs = {n: TensorSpec(s, torch.float32 if "norm" in n else torch.bfloat16) for n, s in shapes.items()}
    generator = torch.Generator().manual_seed(0)
    with MegatronSink(tmp_path / "dense", specs, {"model": to_mapping(DENSE)}) as sink:
        for name, shape in shapes.items():
            sink.write(name, torch.randn(shape, generator=generator) * 0.1 + (1.0 if "norm" in name else 0.0))
    function = made(options(tmp_path / "dense", tmp_path / "moe"))
    print(f"mixed dtypes: {function.logits.relative:.1e} of the logits' scale")
    assert function.logits.relative <= TOLERANCE
    after = MegatronSource(tmp_path / "moe").specs
    assert after["decoder.final_layernorm.weight"].dtype == torch.float32
    assert after["decoder.layers.1.mlp.experts.0.linear_fc1.weight"].dtype == torch.bfloat16


def test_the_card_of_an_export_says_what_was_measured_and_not_how_the_dense_model_was_trained(
    dense: dict[str, Path], tmp_path: Path
) -> None:
    made(options(dense["tied"], tmp_path / "moe", to="hf"))
    card = (tmp_path / "moe" / "README.md").read_text()
    assert "perplexity" in card
    assert "num_moe_experts: null" not in card
