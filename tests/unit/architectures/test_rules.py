"""Each kind of rule is its own inverse, at sizes that are no powers of two."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.architectures.llama import LLAMA
from megatron_ext.architectures.own import MEGATRON_EXT
from megatron_ext.architectures.registry import architecture_of
from megatron_ext.architectures.tables.base import Architecture
from megatron_ext.architectures.tables.fields import config_to_megatron
from megatron_ext.architectures.tables.rules import BlockQkv, GateUp, Qkv, Rename, Rule, Transpose, bias_of, with_biases
from megatron_ext.canonical.catalogue import model_shapes
from megatron_ext.config import ModelConfig
from megatron_ext.model_io.engine import hf_shapes, tasks_to_hf, tasks_to_megatron
from megatron_ext.testing.tiny import tiny_model
from tests.unit.model_io.references import REFERENCES, Sizes, raw_config


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    groups = draw(st.integers(1, 3))
    head = 2 * draw(st.integers(1, 3))
    return ModelConfig(
        num_layers=draw(st.integers(1, 3)),
        hidden_size=draw(st.integers(3, 11)),
        ffn_hidden_size=draw(st.integers(1, 9)),
        num_attention_heads=groups * draw(st.integers(1, 3)),
        num_query_groups=groups,
        kv_channels=head,
        vocab_size=draw(st.integers(2, 30)),
        make_vocab_size_divisible_by=draw(st.integers(1, 16)),
        num_moe_experts=draw(st.integers(2, 5)),
        moe_ffn_hidden_size=draw(st.integers(1, 7)),
        moe_first_k_dense=draw(st.integers(0, 1)),
        moe_shared_expert_intermediate_size=draw(st.none() | st.integers(1, 6)),
        untie_embeddings_and_output_weights=draw(st.booleans()),
    )


@settings(max_examples=40)
@given(models())
def test_every_tensor_survives_the_way_there_and_back(model: ModelConfig) -> None:
    """Megatron -> Hugging Face -> Megatron is bitwise the identity (the vocabulary's padding is made of zeros)."""
    architecture = MEGATRON_EXT
    there = {}
    originals = {name: torch.randn(shape) for name, shape in model_shapes(model).items()}
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        if name in originals:
            originals[name][model.vocab_size :] = 0
    for task in tasks_to_hf(architecture.weights, model):
        made = task.make({role: originals[name] for role, name in task.reads.items()})
        there |= {task.writes[role]: tensor for role, tensor in made.items()}
    assert {name: tuple(t.shape) for name, t in there.items()} == hf_shapes(architecture.weights, model)
    back = {}
    for task in tasks_to_megatron(architecture.weights, model):
        made = task.make({role: there[name] for role, name in task.reads.items()})
        back |= {task.writes[role]: tensor for role, tensor in made.items()}
    assert back.keys() == originals.keys()
    assert all(torch.equal(back[name], originals[name]) for name in originals)


def test_qkv_groups_are_interleaved_as_megatron_has_them() -> None:
    model = tiny_model()  # 4 heads in 2 groups, head width 16
    q, k, v = torch.arange(64.0)[:, None], 100 + torch.arange(32.0)[:, None], 200 + torch.arange(32.0)[:, None]
    fused = Qkv("m", q="q", k="k", v="v").to_megatron({"q": q, "k": k, "v": v}, model).flatten()
    expected = [*range(32), *range(100, 116), *range(200, 216), *range(32, 64), *range(116, 132), *range(216, 232)]
    assert fused.tolist() == expected


@pytest.mark.parametrize(
    ("rule", "parts"),
    [
        (Rename("m", hf="h"), {"tensor": torch.randn(3, 4)}),
        (Rename("m", hf="h", vocab=True), {"tensor": torch.randn(250, 4)}),
        (Qkv("m", q="q", k="k", v="v"), {"q": torch.randn(64, 5), "k": torch.randn(32, 5), "v": torch.randn(32, 5)}),
        (Qkv("m", q="q", k="k", v="v"), {"q": torch.randn(64), "k": torch.randn(32), "v": torch.randn(32)}),
        (GateUp("m", gate="g", up="u"), {"gate": torch.randn(7, 5), "up": torch.randn(7, 5)}),
        (GateUp("m", gate="g", up="u"), {"gate": torch.randn(7), "up": torch.randn(7)}),
        (Transpose("m", hf="h"), {"tensor": torch.randn(3, 7)}),
        (BlockQkv("m", hf="h"), {"tensor": torch.randn(5, 3 * 64)}),
        (BlockQkv("m", hf="h"), {"tensor": torch.randn(3 * 64)}),
    ],
    ids=lambda x: type(x).__name__,
)
def test_from_hugging_face_and_back_is_the_identity(rule: Rule, parts: dict[str, torch.Tensor]) -> None:
    model = tiny_model()
    back = rule.to_hf(rule.to_megatron(parts, model), model)
    assert back.keys() == parts.keys()
    assert all(torch.equal(back[role], parts[role]) for role in parts)


def models_of_every_class() -> list[tuple[Architecture, ModelConfig]]:
    pairs = [(MEGATRON_EXT, tiny_model(moe=True)), (LLAMA, tiny_model(add_bias_linear=True))]
    for hf_class, build in REFERENCES.items():
        architecture = architecture_of({"architectures": [hf_class]}, source="test")
        raw = raw_config(build(Sizes()), hf_class, Sizes())
        pairs.append((architecture, config_to_megatron(architecture.config, raw, source="test")))
    return pairs


@pytest.mark.parametrize(("architecture", "model"), models_of_every_class(), ids=lambda x: getattr(x, "name", ""))
def test_every_megatron_tensor_has_exactly_one_rule(architecture: Architecture, model: ModelConfig) -> None:
    read = [name for task in tasks_to_hf(architecture.weights, model) for name in task.reads.values()]
    assert sorted(read) == sorted(model_shapes(model))
    written = [name for task in tasks_to_hf(architecture.weights, model) for name in task.writes.values()]
    assert len(set(written)) == len(written)


def test_heads_are_collected_from_blocks() -> None:
    model = tiny_model(num_query_groups=None)  # 4 heads of width 16
    q, k, v = (start + torch.arange(64.0) for start in (0, 100, 200))
    fused = BlockQkv("m", hf="h").to_megatron({"tensor": torch.cat((q, k, v))[None]}, model).flatten()
    expected = [start + 16 * head + n for head in range(4) for start in (0, 100, 200) for n in range(16)]
    assert fused.tolist() == expected


def test_biases_have_the_rule_of_their_weights() -> None:
    rule = bias_of(Qkv("a.weight", q="q.weight", k="k.weight", v="v.weight"), with_biases)
    assert (rule.megatron, rule.hf_names()) == ("a.bias", {"q": "q.bias", "k": "k.bias", "v": "v.bias"})
    assert not list(rule.holes(tiny_model()))
