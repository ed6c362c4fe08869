"""gpt-oss, in bf16 or with its experts in MXFP4: `GptOssForCausalLM`. Exports are never packed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_ext.architectures.tables.attention_fields import Groups, HeadWidth
from megatron_ext.architectures.tables.base import Architecture
from megatron_ext.architectures.tables.experts import MEGATRON_MLP, moe_only
from megatron_ext.architectures.tables.fields import Always, ConfigRule, Field, Fixed, Ignored, require_list, said
from megatron_ext.architectures.tables.llama_shape import LAYER, MEGATRON_LAYER, PROJECTION, QKV, SIZES, TRUNK
from megatron_ext.architectures.tables.rope import Rope
from megatron_ext.architectures.tables.routing_fields import EveryLayerMoe, ExpertWidth, SumsToOne
from megatron_ext.architectures.tables.rules import (
    AlternatingGateUp,
    Rename,
    Rule,
    Transpose,
    bias_of,
    everywhere,
    in_moe_layers,
)
from megatron_ext.architectures.tables.storage_variants import Stacked
from megatron_ext.architectures.tables.window_fields import (
    FULL,
    OF_TYPES,
    SLIDING,
    LayerWindows,
    layer_types,
    window_of,
)
from megatron_ext.config import ModelConfig
from megatron_ext.errors import ConversionError

WINDOW = 128
"""What an absent `sliding_window` means."""


@dataclass(frozen=True)
class AlternatingWindows(LayerWindows):
    """The window of the layers that `layer_types` names; absent, that means every second one from the first on."""

    def to_hf(self, model: ModelConfig) -> dict[str, Any]:
        # The class asks for a window also where no layer has one.
        return {"sliding_window": model.sliding_window or WINDOW, "layer_types": layer_types(model)}

    def to_megatron(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        types, count = raw.get("layer_types"), raw.get("num_hidden_layers")
        if not isinstance(count, int):
            return {}  # what is wrong is said of that one
        if types is None:
            types = [FULL if layer % 2 else SLIDING for layer in range(count)]
        require_list("layer_types", types, OF_TYPES)
        if len(types) != count:
            raise ConversionError(f"{said('layer_types', types)}: needs one entry for each of {count} layers")
        return window_of(raw.get("sliding_window", WINDOW), types)


@dataclass(frozen=True)
class StatedRope(Rope):
    """Rotary embedding that has to be given: without it the class takes YaRN, and versions differ in its numbers."""

    def to_megatron(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        if not raw.get("rope_parameters") and not raw.get("rope_scaling"):
            raise ConversionError("rope_parameters, rope_scaling: not given; write what the model was trained with")
        return super().to_megatron(raw)


@dataclass(frozen=True)
class ClampedSwiglu(ConfigRule):
    """The activation of the experts; slope and offset are the class's own, and it has no other than with a limit."""

    limit: float = 7.0
    """What absent means."""

    def hf_names(self) -> tuple[str, ...]:
        return ("swiglu_limit", "swiglu_alpha")

    def megatron_names(self) -> tuple[str, ...]:
        return ("activation_func", "activation_func_clamp_value", "glu_linear_offset")

    def to_hf(self, model: ModelConfig) -> dict[str, Any]:
        return {"swiglu_limit": model.activation_func_clamp_value}

    def to_megatron(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        if (slope := raw.get("swiglu_alpha", 1.702)) != 1.702:
            raise ConversionError(f"{said('swiglu_alpha', slope)}: only 1.702 can be expressed in Megatron here")
        limit = raw.get("swiglu_limit")
        fields = {"activation_func_clamp_value": self.limit if limit is None else limit}
        return fields | {"activation_func": "quick_gelu", "glu_linear_offset": 1.0}

    def unsupported_fields(self, model: ModelConfig) -> list[str]:
        needed = {"activation_func": "quick_gelu", "glu_linear_offset": 1.0}
        lost = [said(name, getattr(model, name)) for name, value in needed.items() if getattr(model, name) != value]
        return lost + (["activation_func_clamp_value = None"] if model.activation_func_clamp_value is None else [])


@dataclass(frozen=True)
class Mxfp4(ConfigRule):
    """Experts packed in MXFP4, which are unpacked as they are read; `modules_to_not_convert` are stored as they are."""

    hf: str = "quantization_config"

    def hf_names(self) -> tuple[str, ...]:
        return (self.hf,)

    def megatron_names(self) -> tuple[str, ...]:
        return ()

    def to_hf(self, model: ModelConfig) -> dict[str, Any]:
        return {}

    def to_megatron(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        stated = raw.get(self.hf)
        if stated is not None and (not isinstance(stated, dict) or stated.get("quant_method") != "mxfp4"):
            raise ConversionError(
                f"{said(self.hf, stated)}: weights of this class are read in bf16 or MXFP4; dequantize them first "
                "(transformers' `from_pretrained(..., quantization_config=...(dequantize=True))` and `save_pretrained`)"
            )
        return {}


CONFIG: tuple[ConfigRule, ...] = (
    *SIZES,
    ExpertWidth("intermediate_size"),
    Groups(default=8),
    HeadWidth(default=64),
    Field("max_position_embeddings", "max_position_embeddings", default=131072),
    Field("rms_norm_eps", "layernorm_epsilon", default=1e-5),
    AlternatingWindows(),
    Always("attention_sinks", True),
    StatedRope(theta=150000.0, partial=None),
    Fixed("attention_bias", True),
    Always("add_bias_linear", True),
    Field("num_local_experts", "num_moe_experts", default=128),
    Field("num_experts_per_tok", "moe_router_topk", default=4),
    EveryLayerMoe(),
    SumsToOne(),
    Always("moe_router_linear_bias", True),
    ClampedSwiglu(),
    Mxfp4(),
    # Declared, and read by nothing.
    Ignored(("hidden_act",), writes=(("hidden_act", "silu"),)),
)

EXPERTS = f"{LAYER}.mlp.experts"
_EXPERT = f"{EXPERTS}.{{expert}}"
"""An expert's part of each tensor, which files do not name."""
_ROUTER = Rename(f"{MEGATRON_MLP}.router.weight", in_moe_layers, hf=f"{LAYER}.mlp.router.weight")


def _of_experts() -> tuple[Rule, ...]:
    fc1, fc2 = (f"{MEGATRON_MLP}.experts.{{expert}}.linear_fc{n}" for n in (1, 2))
    return (
        AlternatingGateUp(f"{fc1}.weight", in_moe_layers, hf=f"{_EXPERT}.gate_up_proj"),
        AlternatingGateUp(f"{fc1}.bias", in_moe_layers, hf=f"{_EXPERT}.gate_up_proj_bias"),
        Transpose(f"{fc2}.weight", in_moe_layers, hf=f"{_EXPERT}.down_proj"),
        Rename(f"{fc2}.bias", in_moe_layers, hf=f"{_EXPERT}.down_proj_bias"),
    )


GPT_OSS = Architecture(
    name="gpt_oss",
    hf_class="GptOssForCausalLM",
    model_type="gpt_oss",
    config=CONFIG,
    weights=(
        *TRUNK,
        bias_of(QKV, everywhere),
        bias_of(PROJECTION, everywhere),
        Rename(f"{MEGATRON_LAYER}.self_attention.core_attention.softmax_offset", hf=f"{LAYER}.self_attn.sinks"),
        _ROUTER,
        bias_of(_ROUTER, in_moe_layers),
        *_of_experts(),
    ),
    extra_check=moe_only,
    stacked=tuple(
        Stacked(f"{EXPERTS}.{name}", (f"{_EXPERT}.{name}",), written=True, packed=not name.endswith("_bias"))
        for name in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
    ),
)
