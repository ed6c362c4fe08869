"""What a step reads is shown as training reads it."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_ext.config import Amount, DataSource, RunConfig, Stage, StagedSource, load_config
from megatron_ext.data.inspect.documents import Documents, text_of
from megatron_ext.data.tokenizer import Tokenizer
from megatron_ext.errors import ConfigError
from megatron_ext.training.show_plan import show_plan
from megatron_ext.training.step_contents import show_step
from tests.support.workspace import prepare_data, run_mapping


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    directory = tmp_path_factory.mktemp("step")
    prepare_data(directory)
    mapping = run_mapping(directory)
    mapping["data"]["train"].append({"path": str(directory / "data" / "test"), "id": "other", "weight": 0.3})
    return load_config(RunConfig, mapping, source="run.yaml")


def test_each_sample_has_its_source_place_and_text(run: RunConfig) -> None:
    shown = list(show_step(run, 2, most=6, characters=10_000))
    assert shown[0] == "step 2 of 6, stage train: samples 8 to 15"
    assert shown[-1].endswith("and 2 more; --samples 8 shows all")
    tokenizer = Tokenizer(run.data.tokenizer)
    files = {"data": Documents(run.data.train[0].path), "other": Documents(run.data.train[1].path)}
    found = {"data": 0, "other": 0}
    for head, text in zip(shown[1:-1:2], shown[2:-1:2], strict=True):
        match = re.match(
            r"\nsample \d+: (\w+), sample \d+ of it, epoch 0; document (\d+)(?: from token|, tokens) (\d+)", head
        )
        assert match, head
        source, document, first = match[1], int(match[2]), int(match[3])
        tokens = files[source][document].tolist()[first : first + 64]
        assert text.startswith(text_of(tokens, tokenizer))
        found[source] += 1
    assert all(found.values())


def test_a_step_that_the_run_has_not_is_named(run: RunConfig) -> None:
    with pytest.raises(ConfigError, match="step = 7: the run has the steps 1 to 6"):
        list(show_step(run, 7, most=1, characters=10))


def test_the_plan_is_shown_with_rates_from_the_manifests_or_from_what_is_stated(run: RunConfig, tmp_path: Path) -> None:
    shown = [" ".join(line.split()) for line in show_plan(run, "run.yaml")]
    assert shown[0] == "train 6 steps 3.07K tokens 8 x 64 lr 0.0005 to 0"
    assert shown[3].startswith("in all 6 steps 3.07K tokens")
    path = str(tmp_path / "none")
    gone = replace(run, data=replace(run.data, train=[DataSource(path=path)]))
    with pytest.raises(
        ConfigError, match=r"run.yaml: 1 problem\n  data.train.0.path = .*/none: is not there; prepare it"
    ):
        list(show_plan(gone, "run.yaml"))
    planned = {"a": StagedSource(path=path, tokens=6401.0), "b": StagedSource(path=path, tokens=129.0)}
    stages = [Stage(name="s", mix={"a": 1}, steps=2), Stage(name="t", take={"b": Amount(epochs=4)})]
    staged = replace(run, train=replace(run.train, train_iters=0))
    data = replace(run.data, train=[], cache_dir=None, sources=planned, stages=stages)
    staged = replace(staged, data=data)
    shown = [" ".join(line.split()) for line in show_plan(staged, "run.yaml")]
    assert shown[:3] == [
        "s 2 steps 1.02K tokens 8 x 64 lr 0.0005 to 0.001",
        "a 1.02K tokens 0.160 epochs 100.0%",
        "t 1 steps 512 tokens 8 x 64 lr 0 to 0",
    ]
