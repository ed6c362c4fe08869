"""Every architecture against transformers: logits after import, and export that brings every bit back."""

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_ext.architectures.registry import architecture_for
from megatron_ext.checkpoint.hf_directory import HuggingFaceSource
from megatron_ext.model_io.compare import checkpoint_logits, compare_logits, compare_weights
from megatron_ext.model_io.convert import convert
from megatron_ext.model_io.logits import megatron_logits
from megatron_ext.model_io.open import read_hugging_face_model
from megatron_ext.testing.tiny import tiny_model
from tests.conftest import WRITE_CONVERSION_TABLE
from tests.support.checkpoints import write_checkpoint
from tests.unit.model_io import references
from tests.unit.model_io.consumers import (
    BY_ACCELERATE_ALONE,
    LLAMA_CPP,
    NO_DENSE_LAYERS,
    VLLM,
    dispatched_by_accelerate,
    unknown_to_llama_cpp,
    unknown_to_vllm,
)
from tests.unit.model_io.readme_table import BEGIN, END, OWN, REMOTE, Proof, fault, read_table, write_table
from tests.unit.model_io.references import REFERENCES, YARN, Sizes, randomize, save

# fp32 rounds to 6e-8; three layers of sums in another order leave 2e-6 of the logits' scale at most. Tried: GELU for
# its tanh approximation shows as 2e-4, an epsilon of 1e-5 for 1e-6 as 5e-4, a wrong score of groups of experts as 1e-1.
TOLERANCE = 1e-5

# Special tokens come from the tokenizer, and these models have none; the version is the writer's.
NOT_OF_THE_MODEL = {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version", "_name_or_path"}
# Fields that transformers' DeepSeek classes do not have, and other implementations read.
FOR_OTHER_READERS = {"aux_loss_alpha", "moe_layer_freq", "scoring_func", "seq_aux", "topk_method"}


def tokens_for(s: Sizes) -> torch.Tensor:
    return torch.randint(0, s.vocabulary, (2, 40), generator=torch.Generator().manual_seed(1))


def prove(network: Any, hf_class: str, s: Sizes, directory: Path) -> Proof:
    """Save `network`, import it, compare the logits, export it again, compare every tensor."""
    randomize(network)
    save(network.eval(), directory / "hf", hf_class, s)
    convert(directory / "hf", directory / "megatron")
    with torch.no_grad():
        expected = network(tokens_for(s)).logits
    compared = compare_logits([expected], megatron_logits(directory / "megatron", [tokens_for(s)]))
    convert(directory / "megatron", directory / "back", hf_class=hf_class)
    first, second = HuggingFaceSource(directory / "hf"), HuggingFaceSource(directory / "back")
    same = first.specs == second.specs and all(torch.equal(first.read(n), second.read(n)) for n in first.specs)
    return Proof(compared.relative, compared.argmax_agreement, same)


def meaning(directory: Path) -> dict[str, Any]:
    """Transformers' reading of a config.json, without what is not the model's."""
    fields = AutoConfig.from_pretrained(directory).to_dict()
    if rope := fields.get("rope_parameters"):
        rope.pop("type", None)  # the older name of rope_type, written for older readers
        if rope["rope_type"] == "yarn":
            rope.update({"beta_fast": rope.get("beta_fast", 32.0), "beta_slow": rope.get("beta_slow", 1.0)})
    return {name: value for name, value in fields.items() if name not in NOT_OF_THE_MODEL}


def assert_same_meaning(original: Path, exported: Path) -> None:
    first, second = meaning(original), meaning(exported)
    assert {name: second[name] for name in first} == first
    assert second.keys() - first.keys() <= FOR_OTHER_READERS


@pytest.fixture(scope="module")
def table() -> dict[str, Proof]:
    """What the tests of this file measure, for the README."""
    return {}


EXPORTED_BEFORE = "reads what test_conversion_both_ways exports: run this whole file"


@pytest.fixture(scope="module")
def names() -> dict[str, list[str]]:
    """The tensors of an export of each class."""
    return {}


@pytest.mark.parametrize("hf_class", REFERENCES)
def test_conversion_both_ways(
    hf_class: str, tmp_path: Path, table: dict[str, Proof], names: dict[str, list[str]]
) -> None:
    torch.manual_seed(0)
    s = Sizes()
    network = REFERENCES[hf_class](s)
    table[hf_class] = proof = prove(network, hf_class, s, tmp_path)
    print(f"{hf_class}: max |d| / scale {proof.relative:.1e}, argmax agreement {proof.argmax:.2%}, {proof}")
    assert proof.relative < TOLERANCE
    assert proof.argmax == 1.0
    assert proof.bitwise
    names[hf_class] = list(HuggingFaceSource(tmp_path / "back").specs)
    if hf_class not in REMOTE:
        assert_same_meaning(tmp_path / "hf", tmp_path / "back")
        exported = AutoModelForCausalLM.from_pretrained(
            tmp_path / "back", attn_implementation="eager", experts_implementation="eager", device_map={"": "cpu"}
        )
        prompt = tokens_for(s)[:, :5]
        settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        assert type(exported).__name__ == hf_class
        assert torch.equal(exported.generate(prompt, **settings), network.generate(prompt, **settings))
        if hf_class in BY_ACCELERATE_ALONE:
            dispatched = dispatched_by_accelerate(tmp_path / "back", exported).state_dict()
            assert all(torch.equal(tensor, dispatched[key]) for key, tensor in exported.state_dict().items())


def test_vllm_has_a_place_for_every_tensor(names: dict[str, list[str]]) -> None:
    if not names:
        pytest.skip(EXPORTED_BEFORE)
    assert names.keys() - VLLM.keys() == {"TanukiForCausalLM"}, "a fork of it has that class; others: consumers.py"
    for hf_class, tensors in names.items():
        if hf_class in VLLM:
            assert unknown_to_vllm(hf_class, tensors) == [], hf_class


def test_llama_cpp_has_a_name_for_every_tensor(names: dict[str, list[str]]) -> None:
    pytest.importorskip("gguf")
    if not names:
        pytest.skip(EXPORTED_BEFORE)
    for hf_class, tensors in names.items():
        if hf_class in LLAMA_CPP:
            unknown = unknown_to_llama_cpp(hf_class, tensors, Sizes().layers)
            if hf_class in NO_DENSE_LAYERS:
                assert unknown
                unknown = [name for name in unknown if not re.search(r"\.mlp\.(gate|up|down)_proj", name)]
            assert unknown == [], hf_class


VARIANTS: dict[str, tuple[str, Callable[[Sizes], Any], Sizes]] = {
    "Llama, plain": ("LlamaForCausalLM", references.llama, Sizes()),
    "Llama, linear": (
        "LlamaForCausalLM",
        lambda s: references.llama(s, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
        Sizes(tied=True),
    ),
    "Llama, dynamic": (
        "LlamaForCausalLM",
        lambda s: references.llama(
            s,
            max_position_embeddings=16,
            rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
        ),
        Sizes(),
    ),
    "Mistral, hidden size no multiple of the heads": (
        "MistralForCausalLM",
        lambda s: references.mistral(s, hidden_size=50),
        Sizes(),
    ),
    "Qwen2, head width of its own": ("Qwen2ForCausalLM", lambda s: references.qwen2(s, head_dim=12), Sizes()),
    "Mixtral, YaRN, window": (
        "MixtralForCausalLM",
        lambda s: references.mixtral(s, rope_parameters=dict(YARN), sliding_window=9),
        Sizes(),
    ),
    "GPT-2, untied, four times as wide": (
        "GPT2LMHeadModel",
        lambda s: references.gpt2(s, tie_word_embeddings=False, n_inner=None),
        Sizes(),
    ),
    "Qwen2-MoE, normalized": (
        "Qwen2MoeForCausalLM",
        lambda s: references.qwen2_moe(
            s, norm_topk_prob=True, qkv_bias=False, mlp_only_layers=[0, 1], **references.windows(1, 3, layers=4)
        ),
        Sizes(layers=4),
    ),
    "DeepSeek-V2, greedy, direct queries": (
        "DeepseekV2ForCausalLM",
        lambda s: references.deepseek_v2(s, topk_method="greedy", q_lora_rank=None, n_group=1, topk_group=1),
        Sizes(dense=0),
    ),
    "DeepSeek-V3, no groups, YaRN": (
        "DeepseekV3ForCausalLM",
        lambda s: references.deepseek_v3(
            s, n_group=1, topk_group=1, q_lora_rank=None, norm_topk_prob=False, rope_parameters=dict(YARN)
        ),
        Sizes(experts=7, chosen=3),
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_convert_both_ways(name: str, tmp_path: Path) -> None:
    hf_class, build, s = VARIANTS[name]
    torch.manual_seed(0)
    proof = prove(build(s), hf_class, s, tmp_path)
    print(f"{name}: {proof}")
    assert proof.relative < TOLERANCE
    assert proof.bitwise
    assert_same_meaning(tmp_path / "hf", tmp_path / "back")


@st.composite
def sizes(draw: st.DrawFn) -> Sizes:
    groups, layers = draw(st.integers(1, 3)), draw(st.integers(2, 3))
    return Sizes(
        layers=layers,
        heads=groups * draw(st.integers(1, 3)),
        groups=groups,
        width=4 * draw(st.integers(1, 3)),
        head=2 * draw(st.integers(1, 7)),
        ffn=draw(st.integers(1, 60)),
        vocabulary=draw(st.integers(3, 130)),
        experts=3 * draw(st.integers(2, 3)),
        chosen=draw(st.integers(2, 4)),
        expert=draw(st.integers(1, 30)),
        dense=draw(st.integers(0, layers - 1)),
        tied=draw(st.booleans()),
    )


@pytest.mark.parametrize("hf_class", REFERENCES)
@settings(max_examples=3, phases=[Phase.generate], suppress_health_check=[HealthCheck.too_slow])
@given(s=sizes())
def test_any_sizes_convert_both_ways(hf_class: str, s: Sizes) -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as directory:
        proof = prove(REFERENCES[hf_class](s), hf_class, s, Path(directory))
    print(f"{hf_class}: {proof}, {s}")
    assert proof.relative < TOLERANCE
    assert proof.bitwise


def test_the_bias_that_selects_experts_stays_in_fp32(tmp_path: Path) -> None:
    network = REFERENCES["DeepseekV3ForCausalLM"](Sizes())
    randomize(network)
    network.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "megatron", dtype="bf16")
    convert(tmp_path / "megatron", tmp_path / "back", dtype="bf16")
    back = HuggingFaceSource(tmp_path / "back")
    dtypes = {name: spec.dtype for name, spec in back.specs.items()}
    biases = {name for name in dtypes if name.endswith("e_score_correction_bias")}
    assert biases
    assert all(dtypes[name] == (torch.float32 if name in biases else torch.bfloat16) for name in dtypes)
    original = HuggingFaceSource(tmp_path / "hf")
    assert all(torch.equal(back.read(name), original.read(name)) for name in biases)


@pytest.mark.parametrize(
    ("hf_class", "changes", "chosen"),
    [
        ("MistralForCausalLM", {"sliding_window": None}, "LlamaForCausalLM"),
        ("MistralForCausalLM", {}, "MistralForCausalLM"),
        ("Qwen2MoeForCausalLM", {}, "Qwen2MoeForCausalLM"),
        ("GptOssForCausalLM", {}, "GptOssForCausalLM"),
        ("DeepseekForCausalLM", {}, "MegatronExtForCausalLM"),
        ("TanukiForCausalLM", {}, "MegatronExtForCausalLM"),
    ],
)
def test_an_export_is_the_first_class_that_needs_no_foreign_code(
    hf_class: str, changes: dict[str, Any], chosen: str, tmp_path: Path
) -> None:
    s = Sizes()
    save(REFERENCES[hf_class](s, **changes), tmp_path / "hf", hf_class, s)
    _, model = read_hugging_face_model(tmp_path / "hf")
    assert architecture_for(model)[0].hf_class == chosen
    architecture, why = architecture_for(model, hf_class)
    assert architecture.hf_class == hf_class
    assert ("which was not run" in why) == (hf_class in REMOTE)


def test_our_own_class_converts_both_ways(tmp_path: Path, table: dict[str, Proof]) -> None:
    """What no class of transformers computes; the modelling code of the export is the other side."""
    source = write_checkpoint(tmp_path / "megatron", tiny_model(moe=True, num_moe_experts=5, moe_ffn_hidden_size=41))
    convert(source, tmp_path / "hf")
    tokens = [torch.randint(0, 250, (2, 40), generator=torch.Generator().manual_seed(1))]
    compared = compare_logits(checkpoint_logits(tmp_path / "hf", tokens), megatron_logits(source, tokens))
    convert(tmp_path / "hf", tmp_path / "back")
    convert(tmp_path / "back", tmp_path / "hf again")
    bitwise = not compare_weights(tmp_path / "hf", tmp_path / "hf again").different
    bitwise &= not compare_weights(source, tmp_path / "back").different
    table[OWN] = proof = Proof(compared.relative, compared.argmax_agreement, bitwise)
    print(f"{OWN}: {proof}")
    assert proof.relative < TOLERANCE
    assert proof.bitwise


def test_experts_of_any_width_are_computed_by_transformers(tmp_path: Path) -> None:
    """Its faster kernels want rows of a multiple of 16 bytes; whoever verifies an export must not."""
    plain = {"moe_gating_normalization": None, "moe_shared_expert_intermediate_size": None, "moe_first_k_dense": 0}
    source = write_checkpoint(tmp_path / "megatron", tiny_model(moe=True, moe_ffn_hidden_size=41, **plain))
    assert convert(source, tmp_path / "hf").architecture.hf_class == "MixtralForCausalLM"
    tokens = [torch.randint(0, 250, (2, 40), generator=torch.Generator().manual_seed(1))]
    compared = compare_logits(checkpoint_logits(tmp_path / "hf", tokens), megatron_logits(source, tokens))
    assert compared.relative < TOLERANCE


def test_the_readme_says_of_every_architecture_what_was_measured(
    repository: Path, table: dict[str, Proof], request: pytest.FixtureRequest
) -> None:
    readme, classes = repository / "README.md", [*REFERENCES, OWN]
    if request.config.getoption(WRITE_CONVERSION_TABLE):
        assert table.keys() == set(classes), "run this whole file to write the table"
        write_table(readme, {hf_class: table[hf_class] for hf_class in classes})
    rows = read_table(readme)
    assert list(rows) == classes, f"write the table again: pytest {WRITE_CONVERSION_TABLE}"
    assert not [said for hf_class in table if (said := fault(rows[hf_class], hf_class, table[hf_class]))]


def test_writing_the_readmes_table_keeps_the_rows_that_are_true(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{BEGIN}\n{END}\nafter")
    write_table(readme, {"LlamaForCausalLM": Proof(8e-7, 1.0, True), OWN: Proof(1e-7, 1.0, True)})
    write_table(
        readme,
        {
            "LlamaForCausalLM": Proof(3e-7, 1.0, True),
            "NewForCausalLM": Proof(2e-7, 1.0, True),
            OWN: Proof(1e-5, 1.0, True),
        },
    )
    rows = read_table(readme)
    assert {name: cells[3] for name, cells in rows.items()} == {
        "LlamaForCausalLM": "8e-07",  # another machine's rounding
        "NewForCausalLM": "2e-07",
        OWN: "1e-05",  # was no longer true
    }
    assert readme.read_text().startswith("before\n")
    assert readme.read_text().endswith("\nafter")
