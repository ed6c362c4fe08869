"""Which module each part of a layer is built from: our own specs, since megatron-core's hard-code its local backend."""

import functools
from dataclasses import dataclass
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from megatron_ext.config import ModelConfig
from megatron_ext.mcore.backends.torch import TorchSpecProvider
from megatron_ext.mcore.feed_forward import FeedForward, SharedExperts
from megatron_ext.mcore.moe.dispatcher import MoELayer
from megatron_ext.mcore.moe.router import Router

# megatron-core 0.19 builds an MLP by calling what the spec holds; 0.16 wants a spec to build from.
_SPECS_ARE_CALLABLES = hasattr(MLP, "as_mlp_submodule")


@dataclass(frozen=True)
class _Spec:
    """What 0.16 builds one of our classes from; for a ModuleSpec of a class it does not know it logs a warning."""

    module: type
    submodules: Any


# Dense norms are saved under the names of Transformer Engine's fused layers, whichever backend saves, so that
# checkpoints of both backends load each other. The norm before a MoE layer is a module of its own in both.
_INPUT_NORM_KEY = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
_DENSE_NORM_KEY = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}


def block_spec(model: ModelConfig, config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """Return the specs of the layers of this pipeline stage (and chunk `vp_stage`), and of the final norm."""
    backend = TorchSpecProvider()
    dense, moe = _layer_spec(backend, _dense_mlp(backend), _DENSE_NORM_KEY), None
    if model.num_moe_experts is not None:
        moe = _layer_spec(backend, _moe_mlp(backend, model), {})
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    layers = [moe if is_moe else dense for is_moe in model.moe_layer_pattern[first : first + count]]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=backend.layer_norm(rms_norm=True))


def _layer_spec(backend: TorchSpecProvider, mlp: Any, norm_key: dict[str, str]) -> ModuleSpec:
    norm = backend.layer_norm(rms_norm=True)
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=backend.column_parallel_linear(),
            core_attention=backend.core_attention(),
            linear_proj=backend.row_parallel_linear(),
        ),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={**_INPUT_NORM_KEY, **norm_key},
        ),
    )


def _linears(backend: TorchSpecProvider) -> MLPSubmodules:
    return MLPSubmodules(linear_fc1=backend.column_parallel_linear(), linear_fc2=backend.row_parallel_linear())


def _dense_mlp(backend: TorchSpecProvider) -> Any:
    if _SPECS_ARE_CALLABLES:
        return functools.partial(FeedForward.as_mlp_submodule, submodules=_linears(backend))
    return _Spec(module=FeedForward, submodules=_linears(backend))


def _moe_mlp(backend: TorchSpecProvider, model: ModelConfig) -> Any:
    router = functools.partial(Router, normalization=model.moe_gating_normalization)
    if _SPECS_ARE_CALLABLES:
        shared = functools.partial(SharedExperts, submodules=_linears(backend))
        submodules = MoESubmodules(experts=backend.grouped_experts(), shared_experts=shared, router=router)
        return functools.partial(MoELayer, submodules=submodules)
    shared = ModuleSpec(module=SharedExperts, submodules=_linears(backend))
    experts = ModuleSpec(module=backend.grouped_experts())
    return _Spec(module=MoELayer, submodules=MoESubmodules(experts=experts, shared_experts=shared, router=router))
