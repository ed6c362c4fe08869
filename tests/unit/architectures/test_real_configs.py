"""Published config.json files, as they are: read, written and read again, and read through transformers' own classes.

`real_configs.json` says of each where it stands. Sizes are those of the real models; no weights are made.
"""

import copy
import json
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from megatron_ext.architectures.registry import architecture_of
from megatron_ext.architectures.tables.fields import config_to_hf
from megatron_ext.config import ModelConfig
from megatron_ext.config.base import fields_of
from megatron_ext.config.effective_value import effective_value
from megatron_ext.errors import ConversionError
from tests.unit.architectures.reading import REAL, REFUSED

UNREAD = {
    "HuggingFaceTB/SmolLM2-135M": "is_llama_config = True, rope_interleaved = False",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": "use_mrope = False",
    "unsloth/Llama-3.2-1B": "unsloth_fixed = True",
    "NousResearch/Yarn-Llama-2-7b-64k": "rope_scaling.finetuned = True",
    "vicuna-7b": "max_sequence_length = 2048",
    "openai/gpt-oss-20b": "experts_per_token = 4, initial_context_length = 4096",
    "AutoDecompiler-30B-pscode": "qkv_bias = False, shared_expert_intermediate_size = 0, use_qk_norm = True",
    "ai-sage/GigaChat-20B-A3B-instruct": "mlp_bias = False, moe_implementation = 'eager'",
    "Debug-MoE-Reverse-Text-SFT": "use_grouped_mm = True: read by nothing in Qwen3MoeForCausalLM (transformers ",
    "weblab-GENIAC/Tanuki-8x8B-dpo-v1.0": "code that auto_map names was not looked at), so left out",
    "Llama-3-ELYZA-hermes-2x8B": "attention_bias = False, mlp_bias = False",
}
SILENT = (
    "rinna/japanese-gpt-1b",
    "lmsys/vicuna-7b-v1.5",
    "llm-jp/llm-jp-3-13b",
    "openai-community/gpt2",
    "Qwen/Qwen3-8B",
)


def read(raw: dict[str, Any]) -> ModelConfig:
    return architecture_of(raw, source="config.json").model_of(raw, source="config.json")


@pytest.mark.parametrize("name", [name for name in REAL if name not in REFUSED])
def test_it_is_read_as_transformers_reads_it_and_comes_back(name: str) -> None:
    raw = REAL[name]
    architecture, model = architecture_of(raw, source=name), read(raw)
    written = json.loads(json.dumps(config_to_hf(architecture.config, model)))
    back = architecture.model_of(written, source="written")
    assert [
        field for field in fields_of(ModelConfig) if effective_value(back, field) != effective_value(model, field)
    ] == []
    if architecture.model_type in CONFIG_MAPPING:
        theirs = CONFIG_MAPPING[architecture.model_type].from_dict(copy.deepcopy(raw)).to_dict()
        assert config_to_hf(architecture.config, read(theirs | {"architectures": [architecture.hf_class]})) == written


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_converted_is_refused_with_the_way_out(name: str) -> None:
    with pytest.raises(ConversionError, match=f"(?s){REFUSED[name]}"):
        read(REAL[name])


def test_fields_that_nothing_reads_are_named() -> None:
    for name, expected in UNREAD.items():
        (said,) = architecture_of(REAL[name], source=name).unread(REAL[name])
        assert expected in said, name
    for name in SILENT:
        assert not architecture_of(REAL[name], source=name).unread(REAL[name]), name


def test_there_are_many_of_every_class() -> None:
    assert len(REAL) - len(REFUSED) >= 60
    assert len({architecture_of(REAL[name], source=name).name for name in REAL.keys() - REFUSED.keys()}) == 15
