"""Files config.json, as transformers writes them of a class and as they are published, and the model that we read."""

import json
from pathlib import Path
from typing import Any

from megatron_ext.architectures.registry import architecture_of
from megatron_ext.config import ModelConfig
from tests.unit.model_io.references import REFERENCES, Sizes, raw_config

REAL: dict[str, dict[str, Any]] = {
    name: entry["config"]
    for name, entry in json.loads((Path(__file__).parent / "real_configs.json").read_text(encoding="utf-8")).items()
}
"""Published config.json files, as they are, by name."""
REFUSED = {
    "incomprehensible/three": r"sliding_window = 4096: may change .*; this class has no window here; take it out",
    "TheBloke/Airoboros-L2-13B-2_1-YaRN-64K-AWQ": r"quantization_config = .*the weights are quantized: take the orig",
    "deepseek-ai/DeepSeek-V3": r"quantization_config = .*the weights are quantized: take the original ones, or dequant",
    "moonshotai/Kimi-K2-Instruct": r"model_type = 'kimi_k2', but DeepseekV3ForCausalLM .*write the type into a copy",
    "EleutherAI/pythia-6.9b": r"use_parallel_residual = True: only False can be expressed",
    "EleutherAI/gpt-neox-20b": r"use_parallel_residual = True: only False can be expressed",
    "stabilityai/stablelm-3b-4e1t": r"StableLmForCausalLM.*supported: Llama.*CONTRIBUTING.md, Add an architecture",
}
"""Those of them that are not converted, and what is said of each."""


def reference(hf_class: str) -> dict[str, Any]:
    """The config.json of a tiny model of the class."""
    return raw_config(REFERENCES[hf_class](Sizes()), hf_class, Sizes())


def read(hf_class: str, raw: dict[str, Any]) -> ModelConfig:
    architecture = architecture_of({"architectures": [hf_class]}, source="config.json")
    return architecture.model_of(raw, source="config.json")
