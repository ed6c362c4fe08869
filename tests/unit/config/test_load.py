"""Loading a run: every fault in one message, overrides, and a resolved configuration that reloads as itself."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from megatron_ext.config import (
    DataSource,
    ModelConfig,
    RunConfig,
    dump_yaml,
    load_config,
    load_run,
    read_yaml,
    to_mapping,
)
from megatron_ext.config.base import PathName
from megatron_ext.config.help import describe_keys
from megatron_ext.config.load import raise_faults
from megatron_ext.config.yaml_text import parse_yaml
from megatron_ext.errors import ConfigError
from tests.support.minimal_run import faults, load, mapping


def test_minimal_run_is_valid() -> None:
    run = load(mapping())
    assert run.model.query_groups == 4
    assert run.model.padded_vocab_size == 1024
    assert run.planned_samples == 800


def test_misspelt_key_wrong_type_and_illegal_layout_come_in_one_message() -> None:
    raw = mapping(
        model={"num_moe_experts": 8, "num_layers": "four"},
        parallel={
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
            "expert_tensor_parallel_size": 1,
            "pipeline_model_paralel_size": 2,
        },
    )
    message = faults(raw)
    assert message.startswith("run.yaml: 3 problems")
    assert (
        "parallel.pipeline_model_paralel_size = 2: unknown key; did you mean 'pipeline_model_parallel_size'?" in message
    )
    assert "model.num_layers = 'four': must be an integer" in message
    assert "parallel.tensor_model_parallel_size = 2, parallel.expert_model_parallel_size = 1" in message
    assert "raise expert_model_parallel_size" in message


def test_required_keys_are_named() -> None:
    raw = mapping()
    del raw["model"]["hidden_size"], raw["data"]
    message = faults(raw)
    assert "model.hidden_size: is required" in message
    assert "data: is required" in message


@pytest.mark.parametrize(
    ("section", "key", "hint"),
    [
        ("checkpoint", "lr", "did you mean 'optimizer.lr'?"),
        # The word itself in another section is nearer than a like one in this.
        ("train", "log_interval", "did you mean 'logging.log_interval'?"),
        ("train", "log_intervall", "did you mean 'logging.log_interval'?"),
        ("checkpoint", "interval", "did you mean 'save_interval'?"),
        ("train", "seeds", "did you mean 'seed'?"),
        ("train", "iters", "did you mean 'train_iters'?"),
        ("data", "wieght", "did you mean 'data.train.0.weight' or 'data.validation.0.weight'?"),
        ("model", "moe_shared_expert_size", "did you mean 'moe_shared_expert_intermediate_size'?"),
        # Many sections have it.
        ("checkpoint", "kind", "known here: directory, save_interval"),
        ("parallel", "tp", "known here: tensor_model_parallel_size"),
    ],
)
def test_an_unknown_key_is_told_what_was_meant(section: str, key: str, hint: str) -> None:
    assert f"{section}.{key} = 1: unknown key; {hint}" in faults(mapping(**{section: {key: 1}}))


def test_options_of_a_tool_are_not_told_of_keys_of_a_run() -> None:
    with pytest.raises(ConfigError, match="lr = 1: unknown key; known here: path, weight"):
        load_config(DataSource, {"path": "a", "lr": 1}, source="options")


def test_the_faults_in_the_readme_are_those_that_a_run_with_them_has() -> None:
    root = Path(__file__).resolve().parents[3]
    raw: Any = read_yaml(root / "examples" / "quickstart" / "moe.yaml")
    raw["model"]["moe_shared_expert_size"] = raw["model"].pop("moe_shared_expert_intermediate_size")
    raw["train"]["global_batch_size"] = "many"
    raw["parallel"]["expert_model_parallel_size"] = 1
    text = (root / "README.md").read_text()
    shown = text.partition("/run.yaml: 3 problems")[2].partition("```")[0].strip().splitlines()
    assert faults(raw).splitlines() == ["run.yaml: 3 problems", *(f"  {line.strip()}" for line in shown)]


@pytest.mark.parametrize(
    ("section", "values", "expected"),
    [
        ("precision", {"kind": "fp7"}, "precision.kind = 'fp7': must be one of fp32, bf16"),
        ("train", {"train_iters": 0}, "train.train_iters = 0: must be greater than or equal to 1"),
        ("train", {"train_iters": 1.5}, "train.train_iters = 1.5: must be an integer"),
        ("parallel", {"sequence_parallel": "yes"}, "parallel.sequence_parallel = 'yes': must be true or false"),
        ("checkpoint", {"directory": ""}, "checkpoint.directory = '': must not be empty"),
        ("data", {"train": []}, "data.train: is required, or data.sources with data.stages"),
        ("data", {"train": [{"path": "a", "weight": -1}]}, "data.train.0.weight = -1: must be greater than 0"),
        ("model", {"moe_layer_freq": "all"}, "model.moe_layer_freq = 'all': must be an integer or must be a list"),
        ("schedule", {"kind": "cosine", "wsd_decay_iters": 3}, "schedule.wsd_decay_iters = 3: unknown key"),
    ],
)
def test_wrong_values_are_explained(section: str, values: dict[str, Any], expected: str) -> None:
    assert expected in faults(mapping(**{section: values}))


def test_kind_is_mandatory_when_a_union_is_given() -> None:
    raw = mapping()
    raw["schedule"] = {"warmup_iters": 3}
    assert "schedule.kind: is required, one of constant, linear, cosine, wsd" in faults(raw)


def test_overrides_replace_single_keys() -> None:
    raw = mapping(model={"num_moe_experts": 8})
    run = load(
        raw, "optimizer.lr=3e-4", "data.train.0.weight=2.5", "logging.wandb.mode=off", "model.moe_layer_freq=[1,1,0,1]"
    )
    assert run.optimizer.lr == 3e-4
    assert run.data.train[0].weight == 2.5
    assert run.logging.wandb.mode == "off"
    assert run.model.moe_layer_freq == [1, 1, 0, 1]


@pytest.mark.parametrize("override", ["optimizer.lr", "=3", "data.train.7.weight=1", "optimizer.lr.x=1"])
def test_broken_overrides_are_refused(override: str) -> None:
    assert override.split("=")[0] in faults(mapping(), override)


def test_resolved_run_reloads_as_itself(tmp_path: Path) -> None:
    run = load(
        mapping(
            model={"num_moe_experts": 4, "moe_gating_normalization": {"scale": 2.0}, "moe_layer_freq": [0, 1, 1, 1]},
            schedule={"kind": "wsd", "wsd_decay_iters": 10},
            recompute={"granularity": "selective", "modules": ["moe"]},
        )
    )
    path = tmp_path / "run.yaml"
    path.write_text(dump_yaml(to_mapping(run)))
    assert load_run(path) == run


@given(st.floats(min_value=1e-12, max_value=1.0), st.integers(min_value=1, max_value=10**9), st.text(max_size=20))
def test_values_survive_yaml(lr: float, seed: int, name: str) -> None:
    run = load(mapping(optimizer={"lr": lr}, train={"seed": seed}, logging={"wandb": {"name": name}}))
    again = load(parse_yaml(dump_yaml(to_mapping(run)), source="test"))
    assert again == run


@pytest.mark.parametrize("name", ["0E0", "1e5", "off", "4:16", "0400", "2024-02-30", "0x1f", "1_000", "null", ".inf"])
def test_words_that_look_like_something_else_stay_words(name: str) -> None:
    assert parse_yaml(dump_yaml({"name": name}), source="t") == {"name": name}


def test_yaml_is_read_as_people_mean_it() -> None:
    assert parse_yaml("{a: 1e-4, b: off, c: no, d: true, e: 1.5E+3, f: 12}", source="t") == {
        "a": 1e-4, "b": "off", "c": "no", "d": True, "e": 1500.0, "f": 12,
    }  # fmt: skip


def test_a_key_written_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"t:3:1: the key 'a' is written twice"):
        parse_yaml("a: 1\nb: 2\na: 3\n", source="t")


def test_a_directory_is_told_with_what_could_be_meant(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is a directory; give a YAML file$"):
        read_yaml(tmp_path)
    (tmp_path / "model.yaml").touch()
    with pytest.raises(ConfigError, match=r"is a directory; give a YAML file \(model.yaml in it\)$"):
        read_yaml(tmp_path)


def test_broken_yaml_names_the_place(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: {num_layers: 4\ntrain: 3\n")
    with pytest.raises(ConfigError, match=r"run\.yaml:2"):
        load_run(path)


def test_missing_file_is_one_error() -> None:
    with pytest.raises(ConfigError, match=r"nowhere.yaml: No such file"):
        load_run("nowhere.yaml")


def test_configurations_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        load(mapping()).train.seed = 5  # type: ignore[misc]


def test_help_documents_every_key() -> None:
    text = describe_keys(RunConfig)
    for key in (
        "model.num_layers",
        "parallel.expert_model_parallel_size",
        "schedule.wsd_decay_iters",
        "logging.wandb.mode",
    ):
        assert f"  {key}  (" in text
    lines = text.splitlines()
    undocumented = [
        line
        for line, after in zip(lines, lines[1:], strict=False)
        if line.startswith("  ") and line[2] != " " and not after.strip()
    ]
    assert undocumented == ["  " + line.strip() for line in undocumented if ".kind " in line], (
        "keys without a docstring"
    )


def test_configuration_imports_neither_torch_nor_megatron() -> None:
    code = (
        "import sys, megatron_ext.config, megatron_ext.command; "
        "print([m for m in ('torch', 'megatron', 'transformers') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("text", ["4:16", "0400", "2024-02-30", "2020-13-45", "0o17"])
def test_only_numbers_are_numbers(text: str) -> None:
    assert parse_yaml(f"a: {text}", source="t") == {"a": text}


@pytest.mark.parametrize("content", [b"a: \xff\xfe", b"? [a]\n: 1\n", b"a: \x07\n", b"[" * 5000])
def test_files_that_are_not_yaml_are_one_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        load_run(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimizer.lr=.inf", "optimizer.lr = inf: must be a finite number"),
        ("optimizer.lr=1.0e+300", r"optimizer.lr = 1e\+300: must be at most 3.4e\+38, which fp32 can hold"),
        ("train.seed=4294967296", "must be less than 2147483648"),
        ("precision.kind=[1]", r"precision.kind = \[1\]: must be one of fp32, bf16"),
        ("precision=null", "precision = None: must be a mapping of keys"),
        ("model.rotary_base=.inf", "must be a finite number"),
        ('checkpoint.directory="a\\0b"', r"checkpoint.directory = 'a\\x00b': must be a path; a NUL"),
        (f"train.seed=[{'9, ' * 5000}]", r"train.seed = \[9, (9, )+.{0,3}\.\.\.: must be an integer"),
    ],
)
def test_values_that_no_run_can_use_are_refused(override: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        load_config(RunConfig, mapping(), [override], source="run.yaml")


def test_a_path_is_what_a_file_can_be_called() -> None:
    adapter = TypeAdapter(PathName)
    for text in ("a\0b", "\ud800"):
        with pytest.raises(ValidationError, match="must be a path; a NUL and half a character are in none"):
            adapter.validate_python(text)
    for text in ("a b", os.fsdecode(b"caf\xe9")):
        assert adapter.validate_python(text) == text


def test_a_fault_that_several_looks_meet_is_said_once() -> None:
    with pytest.raises(ConfigError, match=r"^run.yaml: 1 problem\n  state.json: is cut$"):
        raise_faults("run.yaml", ["state.json: is cut"] * 3)


def test_a_key_of_another_kind_is_not_its_own_suggestion() -> None:
    raw = mapping(schedule={"kind": "constant", "min_lr": 1e-4})
    assert "schedule.min_lr = 0.0001: unknown key; known here: kind, warmup_iters" in faults(raw)


def test_a_model_alone_is_held_to_its_rules() -> None:
    raw = {**mapping()["model"], "num_moe_experts": 4, "moe_router_topk": 9}
    with pytest.raises(ConfigError, match="model.moe_router_topk = 9, model.num_moe_experts = 4"):
        load_config(ModelConfig, raw, source="config.json")
