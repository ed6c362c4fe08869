"""The table of a plan, and what of it is worth a warning."""

from pathlib import Path
from typing import Any

import pytest

from megatron_ext.config import DataConfig, load_config, load_run
from megatron_ext.errors import ConfigError
from megatron_ext.planning.data_table import plan_table, plan_warnings
from megatron_ext.training.planned import stated_plan
from megatron_ext.training.startup_checks import check_run
from tests.support.workspace import ROOT
from tests.unit.data.plans import planned, stored

RECIPE = ROOT / "examples" / "recipes" / "jiniac_5b.yaml"


def warned(samples: dict[str, int], stages: list[dict[str, Any]], sources: dict[str, Any] | None = None) -> list[str]:
    plan = planned(samples, stages, sources=sources)
    raw = {"sequence_length": 8, "tokenizer": "t"}
    raw |= {"sources": {name: {"path": name, **(sources or {}).get(name, {})} for name in samples}}
    return plan_warnings(plan, load_config(DataConfig, raw, source="test"))


def test_the_table_has_steps_tokens_and_epochs_of_every_stage_and_the_total() -> None:
    stages = [
        {"name": "web", "mix": {"ja": 3, "en": 1}, "steps": 10},
        {"name": "fine", "take": {"en": {"epochs": 1}}, "global_batch_size": 10, "sequence_length": 4},
    ]
    plan = planned({"ja": 200, "en": 50}, stages)
    text = [" ".join(line.split()) for line in plan_table(plan)]
    assert text == [
        "web 10 steps 1.28K tokens 16 x 8",
        "ja 960 tokens 0.600 epochs 75.0%",
        "en 320 tokens 0.800 epochs 25.0%",
        "fine 10 steps 400 tokens 10 x 4",
        "en 400 tokens 1.000 epochs 100.0%",
        "in all 20 steps 1.68K tokens",
        "en 720 tokens 1.800 epochs",
        "ja 960 tokens 0.600 epochs",
    ]
    rates = [line for line in plan_table(plan, lambda step: 0.5 / (step + 1)) if "lr" in line]
    assert ["lr 0.5 to 0.05" in rates[0], "lr 0.0455 to 0.025" in rates[1]] == [True, True]
    ended = planned({"ja": 200, "en": 50}, [{"name": "fine", "mix": {"en": 1}, "steps": 1}], progress=stored(plan, 16))
    assert "ended early" in plan_table(ended)[0]


def test_repeated_forgotten_and_tiny_sources_are_warned_of() -> None:
    stages = [
        {"name": "A", "mix": {"ja": 0.9, "en": 0.1}, "steps": 3},
        {"name": "B", "mix": {"en": 1}, "steps": 900},
    ]
    found = warned({"ja": 1000, "en": 2000}, stages)
    assert [line.split(" ")[0] for line in found] == ["en", "ja", "ja"]
    assert found[0].startswith("en is read 7.2 times, more than max_epochs = 4")
    assert found[1].startswith("ja is 89.6% of stage A and missing in B")
    assert found[2].startswith("ja fills 2.69 of 903 steps: hardly seen")
    same = {"ja": {"language": "x"}, "en": {"language": "x", "max_epochs": 9}}
    assert [line.split(" ")[0] for line in warned({"ja": 1000, "en": 2000}, stages, same)] == ["ja"]
    assert (
        "its files have 8,001"
        in warned({"ja": 1000}, [{"name": "A", "mix": {"ja": 1}, "steps": 99}], {"ja": {"tokens": 5e3}})[0]
    )
    rare = [{"name": "A", "mix": {"ja": 1, "en": 2e-5}, "samples": 2_000_000}]
    assert any(
        "of 1,048,576 samples: its share is rounded" in line for line in warned({"ja": 10**6, "en": 10**6}, rare)
    )


def test_amounts_far_from_whole_steps_and_sources_that_no_stage_reads_are_warned_of() -> None:
    few = {"name": "A", "take": {"ja": {"samples": 3}}}
    found = warned({"ja": 1000, "en": 1000}, [few])
    assert "stage A takes 3 samples and reads 16: it ends with a whole step of 16" in found[-2]
    assert found[-1] == "data.sources.en is read by no stage"
    many = {"name": "A", "take": {"ja": {"samples": 1599}}}
    assert not any("whole step" in line for line in warned({"ja": 1000}, [many]))


def test_a_rotary_base_that_is_not_kept_is_warned_of() -> None:
    stages = [{"name": name, "mix": {"ja": 1}, "steps": 60} for name in "AB"]
    stages[0]["rotary_base"] = 5e5
    assert warned({"ja": 10_000}, stages) == [
        "stage B has model.rotary_base again, after 500,000 in A: say rotary_base there too, if that is to stay"
    ]


def test_what_a_change_of_length_passes_over_is_said_and_warned_of_where_it_is_much() -> None:
    first = {"name": "A", "mix": {"ja": 1}, "samples": 21, "global_batch_size": 1, "sequence_length": 2}
    long = {"name": "B", "take": {"ja": {"samples": 5}}, "global_batch_size": 1}
    lines = [" ".join(line.split()) for line in plan_table(planned({"ja": 60}, [first, long]))]
    assert "ja 40 tokens 0.083 epochs 100.0% 6 passed over: other sequence length" in lines
    assert lines[-1] == "ja 82 tokens 0.171 epochs 6 passed over"
    assert warned({"ja": 60}, [first, long])[0].startswith("of ja 6 tokens are passed over where the sequence length")
    assert not any("passed over" in line for line in warned({"ja": 300}, [first, long]))
    whole = {"name": "A", "take": {"ja": {"epochs": 1}}, "global_batch_size": 1, "sequence_length": 2}
    assert not any("passed over" in line for line in plan_table(planned({"ja": 60}, [whole, long])))


def test_a_weight_that_is_never_drawn_is_refused() -> None:
    with pytest.raises(ConfigError, match="a weight of 5e-07 for 'en' is less than one of 1,048,576 samples"):
        planned({"ja": 10, "en": 10}, [{"name": "A", "mix": {"ja": 1, "en": 5e-7}, "samples": 2}])


def test_a_real_plan_is_told_before_its_data_are_there() -> None:
    text = check_run(str(RECIPE), [], 64, files=False, open_foreign=lambda path: None)
    lines = [" ".join(line.split()) for line in text.splitlines() if line.startswith(("data ", "warning"))]
    for expected in (
        "data english 8,584 steps 36.0B tokens 1,024 x 4,096 lr 1.05e-07 to 0.0002",
        "data code 43 steps 180M tokens 1,024 x 4,096 lr 5e-05 to 5e-05",
        "data in all 33,188 steps 139B tokens",
        "warning code fills 43 of 33,188 steps: hardly seen, unless it is repeated",
    ):
        assert any(line.startswith(expected) for line in lines), expected
    assert any(line.startswith("warning en is 100% of stage english and missing in japanese pdf") for line in lines)
    run = load_run(RECIPE)
    plan = stated_plan(run.data, run.train)
    assert plan is not None
    by_language = {
        language: sum(
            plan.consumed(plan.total_samples)[n].tokens for n, s in run.data.sources.items() if s.language == language
        )
        for language in ("en", "ja")
    }
    assert {key: round(value / 1e9) for key, value in by_language.items()} == {"en": 42, "ja": 97}


def test_a_plan_of_unknown_sizes_says_so(tmp_path: Path) -> None:
    text = RECIPE.read_text().replace(", tokens: 36e9", "")
    (tmp_path / "run.yaml").write_text(text)
    said = check_run(str(tmp_path / "run.yaml"), [], 64, files=False, open_foreign=lambda path: None)
    assert "a token; how many tokens the stages have, their sources say" in said
