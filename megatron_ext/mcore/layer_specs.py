"""Which module each part of a layer is built from: our own specs, since megatron-core's hard-code its local backend."""

import functools
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from megatron_ext.config import Fp8Precision, ModelConfig
from megatron_ext.mcore.backends.torch import Fp8TorchSpecProvider, TorchSpecProvider
from megatron_ext.mcore.moe.router import Router

# megatron-core 0.19 builds an MLP by calling what the spec holds; 0.16 wants a ModuleSpec to build from.
_SPECS_ARE_CALLABLES = hasattr(MLP, "as_mlp_submodule")

# Dense norms are saved under the names of Transformer Engine's fused layers, whichever backend saves, so that
# checkpoints of both backends load each other. The norm before a MoE layer is a module of its own in both.
_INPUT_NORM_KEY = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
_DENSE_NORM_KEY = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}


def block_spec(model: ModelConfig, config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """Return the specs of the layers of this pipeline stage (and chunk `vp_stage`), and of the final norm."""
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    kinds = list(zip(model.moe_layer_pattern, fp8_layers(model.num_layers, config.torch_fp8), strict=True))
    specs = {(is_moe, is_fp8): _spec(model, is_moe, is_fp8) for is_moe, is_fp8 in set(kinds)}
    layers = [specs[kind] for kind in kinds[first : first + count]]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=TorchSpecProvider().layer_norm(rms_norm=True))


def fp8_layers(num_layers: int, fp8: Fp8Precision | None) -> list[bool]:
    """For each layer, whether its matrix products run in fp8."""
    if fp8 is None:
        return [False] * num_layers
    end = num_layers - fp8.num_layers_at_end_in_bf16
    return [fp8.num_layers_at_start_in_bf16 <= layer < end for layer in range(num_layers)]


def _spec(model: ModelConfig, is_moe: bool, is_fp8: bool) -> ModuleSpec:
    backend = Fp8TorchSpecProvider() if is_fp8 else TorchSpecProvider()
    if is_moe:
        return _layer_spec(backend, _moe_mlp(backend, model), {})
    return _layer_spec(backend, _dense_mlp(backend), _DENSE_NORM_KEY)


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
        return functools.partial(MLP.as_mlp_submodule, submodules=_linears(backend))
    return ModuleSpec(module=MLP, submodules=_linears(backend))


def _moe_mlp(backend: TorchSpecProvider, model: ModelConfig) -> Any:
    router = functools.partial(Router, normalization=model.moe_gating_normalization)
    if _SPECS_ARE_CALLABLES:
        shared = functools.partial(SharedExpertMLP, submodules=_linears(backend))
        submodules = MoESubmodules(experts=backend.grouped_experts(), shared_experts=shared, router=router)
        return functools.partial(MoELayer, submodules=submodules)
    shared = ModuleSpec(module=SharedExpertMLP, submodules=_linears(backend))
    experts = ModuleSpec(module=backend.grouped_experts())
    return ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts=experts, shared_experts=shared, router=router))
