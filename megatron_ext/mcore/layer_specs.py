"""Which module each part of a layer is built from: our own specs, since megatron-core's hard-code its local backend."""

import functools
from dataclasses import dataclass
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules, get_transformer_layer_offset

from megatron_ext.canonical.naming import FUSED_NORMS
from megatron_ext.config import Fp8Precision, ModelConfig
from megatron_ext.mcore.backends import layer_provider
from megatron_ext.mcore.layer import SummedLayer
from megatron_ext.mcore.layer_provider import LayerProvider
from megatron_ext.mcore.mla import DownProjection, LatentAttention
from megatron_ext.mcore.moe.dispatcher import MoELayer
from megatron_ext.mcore.moe.router import Router
from megatron_ext.mcore.moe.shared_experts import BiasedSharedExperts
from megatron_ext.mcore.qk_norm import ProjectionNormAttention
from megatron_ext.mcore.self_attention import RotatedSelfAttention
from megatron_ext.mcore.transformer_config import LayerConfig

# megatron-core 0.19 builds an MLP by calling what the spec holds; 0.16 wants a spec to build from.
_SPECS_ARE_CALLABLES = hasattr(MLP, "as_mlp_submodule")


@dataclass(frozen=True)
class _Spec:
    """What 0.16 builds one of our classes from; for a ModuleSpec of a class it does not know it logs a warning."""

    module: type
    submodules: Any


# Dense norms are saved under the names of Transformer Engine's fused layers, whichever backend saves, so that
# checkpoints of both backends load each other. The norm before a MoE layer is a module of its own in both.
_NORM_KEYS = {norm: {f"{norm}.": f"{linear}.layer_norm_"} for norm, linear in FUSED_NORMS.items()}
_DENSE_NORM_KEY = _NORM_KEYS["pre_mlp_layernorm"]
_ATTENTION_NORM_KEYS = _NORM_KEYS["input_layernorm"]
_LATENT_NORM_KEYS = _NORM_KEYS["self_attention.q_layernorm"] | _NORM_KEYS["self_attention.kv_layernorm"]


def block_spec(model: ModelConfig, config: LayerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """Return the specs of the layers of this pipeline stage (and chunk `vp_stage`), and of the final norm."""
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    kinds = list(zip(model.moe_layer_pattern, fp8_layers(model.num_layers, config.torch_fp8), strict=True))
    specs = {(is_moe, is_fp8): _spec(model, config, is_moe, is_fp8) for is_moe, is_fp8 in set(kinds)}
    layers = [specs[kind] for kind in kinds[first : first + count]]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=layer_provider(config).norm(model.normalization))


def fp8_layers(num_layers: int, fp8: Fp8Precision | None) -> list[bool]:
    """For each layer, whether its matrix products run in the torch backend's fp8."""
    if fp8 is None:
        return [False] * num_layers
    end = num_layers - fp8.num_layers_at_end_in_bf16
    return [fp8.num_layers_at_start_in_bf16 <= layer < end for layer in range(num_layers)]


def _spec(model: ModelConfig, config: LayerConfig, is_moe: bool, is_fp8: bool) -> ModuleSpec:
    backend = layer_provider(config, fp8=is_fp8)
    if is_moe:
        return _layer_spec(backend, model, _moe_mlp(backend, model), fused_norm=False)
    return _layer_spec(backend, model, _dense_mlp(backend), fused_norm=True)


def _layer_spec(backend: LayerProvider, model: ModelConfig, mlp: Any, *, fused_norm: bool) -> ModuleSpec:
    """One layer; with `fused_norm` the norm before `mlp` is saved as part of its first linear layer."""
    norm = backend.norm(model.normalization)
    fuses = backend.fuses_norms
    latent = model.multi_latent_attention is not None
    # Latent attention projects down first, by a layer that no backend fuses with the norm before it.
    norm_keys = _LATENT_NORM_KEYS if latent else {} if fuses else _ATTENTION_NORM_KEYS
    if fused_norm and not fuses:
        norm_keys = norm_keys | _DENSE_NORM_KEY
    return ModuleSpec(
        module=SummedLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=IdentityOp if fuses and not latent else norm,
            self_attention=(_latent_attention if latent else _attention)(backend, model),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=IdentityOp if fuses and fused_norm else norm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=norm_keys,
        ),
    )


def _latent_attention(backend: LayerProvider, model: ModelConfig) -> ModuleSpec:
    column, norm = backend.column_parallel_linear(), backend.norm(model.normalization)
    return ModuleSpec(
        module=LatentAttention,
        params={"attn_mask_type": AttnMaskType.causal, "model": model},
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=column,
            linear_q_down_proj=DownProjection,
            linear_kv_down_proj=DownProjection,
            linear_q_up_proj=column,
            linear_kv_up_proj=column,
            core_attention=backend.latent_core_attention(),
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=norm,
            kv_layernorm=norm,
        ),
    )


def _attention(backend: LayerProvider, model: ModelConfig) -> ModuleSpec:
    norm = backend.norm(model.normalization) if model.qk_layernorm == "head" else None
    return ModuleSpec(
        module=ProjectionNormAttention if model.qk_layernorm == "projection" else RotatedSelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=backend.linear_after_norm(),
            core_attention=backend.core_attention(),
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=norm,
            k_layernorm=norm,
        ),
    )


def _linears(backend: LayerProvider) -> MLPSubmodules:
    return MLPSubmodules(linear_fc1=backend.column_parallel_linear(), linear_fc2=backend.row_parallel_linear())


def _dense_mlp(backend: LayerProvider) -> Any:
    linears = MLPSubmodules(linear_fc1=backend.linear_after_norm(), linear_fc2=backend.row_parallel_linear())
    feed_forward: Any = backend.feed_forward()
    if _SPECS_ARE_CALLABLES:
        return functools.partial(feed_forward.as_mlp_submodule, submodules=linears)
    return _Spec(module=feed_forward, submodules=linears)


def _moe_mlp(backend: LayerProvider, model: ModelConfig) -> Any:
    router = functools.partial(Router, model=model)
    shared_class = BiasedSharedExperts if model.add_bias_linear else backend.shared_experts()
    if _SPECS_ARE_CALLABLES:
        shared = functools.partial(shared_class, submodules=_linears(backend))
        submodules = MoESubmodules(experts=backend.grouped_experts(), shared_experts=shared, router=router)
        return functools.partial(MoELayer, submodules=submodules)
    shared = ModuleSpec(module=shared_class, submodules=_linears(backend))
    experts = ModuleSpec(module=backend.grouped_experts())
    return _Spec(module=MoELayer, submodules=MoESubmodules(experts=experts, shared_experts=shared, router=router))
