"""A config.json of a class as transformers writes it, and the model that we read in it."""

from typing import Any

from megatron_ext.architectures.registry import architecture_of
from megatron_ext.config import ModelConfig
from tests.unit.model_io.references import REFERENCES, Sizes, raw_config


def reference(hf_class: str) -> dict[str, Any]:
    """The config.json of a tiny model of the class."""
    return raw_config(REFERENCES[hf_class](Sizes()), hf_class, Sizes())


def read(hf_class: str, raw: dict[str, Any]) -> ModelConfig:
    architecture = architecture_of({"architectures": [hf_class]}, source="config.json")
    return architecture.model_of(raw, source="config.json")
