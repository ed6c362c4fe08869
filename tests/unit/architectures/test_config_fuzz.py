"""Wrong values in config.json: each is refused by name, or read; no other exception, and no memory filled."""

import json
import random
import re
from typing import Any

from megatron_ext.architectures.own import MEGATRON_EXT
from megatron_ext.architectures.registry import ARCHITECTURES, architecture_of
from megatron_ext.architectures.tables.fields import config_to_hf
from megatron_ext.errors import ConversionError
from megatron_ext.testing.tiny import tiny_model
from tests.unit.architectures.reading import REAL, REFUSED

MISSING = object()
PYTHONS_WORDS = re.compile(r"operand|unhashable|iterable|has no len|\w+ object|argument of type|not supported between")
VALUES: tuple[Any, ...] = (
    *(MISSING, None, True, False, 0, -1, -5, 1, 7, 10**12, 10**30, 1.5, -0.5, 1e300, float("inf"), float("nan")),
    *("", "16", "x" * 5000, [], [1], [None], [[]], {}, {"a": 1}, {"rope_type": [1]}, {"type": "linear"}),
    *({"rope_theta": "x"}, {"type": "yarn", "factor": -1}, {"rope_type": "llama3", "factor": 8.0}),
)


def one_of_each_class() -> dict[str, dict[str, Any]]:
    configs = {architecture_of(raw, source=name).name: raw for name, raw in REAL.items() if name not in REFUSED}
    own = json.loads(json.dumps(config_to_hf(MEGATRON_EXT.config, tiny_model(moe=True))))
    return configs | {"megatron_ext": own | {"architectures": ["MegatronExtForCausalLM"]}}


def refusal(raw: dict[str, Any]) -> str | None:
    try:
        architecture = architecture_of(raw, source="config.json")
        architecture.model_of(raw, source="config.json")
        architecture.unread(raw)
    except ConversionError as error:
        return str(error)
    return None


def test_a_wrong_value_is_refused_by_name() -> None:
    configs, generator = one_of_each_class(), random.Random(0)
    lacking = {architecture.name for architecture in ARCHITECTURES} - configs.keys()
    assert not lacking, "real_configs.json has no config.json of these"
    refused = 0
    for name, raw in configs.items():
        for field in raw:
            for value in generator.sample(VALUES, 5):
                changed = raw | {field: value}
                if value is MISSING:
                    del changed[field]
                if (message := refusal(changed)) is not None:
                    refused += 1
                    assert field in message, (name, field, value, message)
                    assert len(message) < 5000, (name, field)
                    assert not PYTHONS_WORDS.search(message), (name, field, value, message)
    print(f"{refused} refused")
    assert refused > 500


def test_what_is_of_another_kind_is_told_what_is_expected() -> None:
    """Of the fields whose kind rules rely on."""
    configs = one_of_each_class()
    rope = {"rope_type": [], "factor": 2.0}
    for name, field, value, expected in (
        ("gpt_oss", "layer_types", -1, "layer_types = -1: expected a list with full_attention or sliding_attention"),
        ("gpt_oss", "rope_scaling", rope, r"rope_scaling.rope_type = \[\]: expected one of default, linear, .*yarn"),
        ("qwen3_moe", "mlp_only_layers", 1.5, "mlp_only_layers = 1.5: expected a list of numbers of layers"),
        ("qwen3_moe", "decoder_sparse_step", "2", "decoder_sparse_step = '2': expected a whole number of layers"),
        ("qwen3", "head_dim", {"a": 1}, "head_dim = {'a': 1}"),
    ):
        message = refusal(configs[name] | {field: value})
        assert message is not None, (name, field)
        assert re.search(expected, message), message
