"""Our own `MegatronExtForCausalLM`: models no class of transformers computes, with modelling code in the export."""

from megatron_ext.architectures import llama
from megatron_ext.architectures.base import Architecture
from megatron_ext.architectures.fields import Field, LayerPattern, Normalization
from megatron_ext.architectures.llama import LAYER, MEGATRON_LAYER
from megatron_ext.architectures.rules import GateUp, Rename, in_moe_layers, with_shared_experts

CONFIG = (
    *llama.CONFIG,
    Field("num_experts", "num_moe_experts"),
    Field("num_experts_per_tok", "moe_router_topk"),
    Field("moe_intermediate_size", "moe_ffn_hidden_size"),
    Field("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"),
    LayerPattern("moe_layer_pattern"),
    Field("softmax_before_topk", "moe_router_pre_softmax"),
    Field("routed_scaling_factor", "moe_router_topk_scaling_factor"),
    Normalization("gating_normalization"),
)

MOE_FFN = (
    Rename(f"{MEGATRON_LAYER}.mlp.router.weight", in_moe_layers, hf=f"{LAYER}.mlp.gate.weight"),
    GateUp(
        f"{MEGATRON_LAYER}.mlp.experts.{{expert}}.linear_fc1.weight",
        in_moe_layers,
        gate=f"{LAYER}.mlp.experts.{{expert}}.gate_proj.weight",
        up=f"{LAYER}.mlp.experts.{{expert}}.up_proj.weight",
    ),
    Rename(
        f"{MEGATRON_LAYER}.mlp.experts.{{expert}}.linear_fc2.weight",
        in_moe_layers,
        hf=f"{LAYER}.mlp.experts.{{expert}}.down_proj.weight",
    ),
    GateUp(
        f"{MEGATRON_LAYER}.mlp.shared_experts.linear_fc1.weight",
        with_shared_experts,
        gate=f"{LAYER}.mlp.shared_expert.gate_proj.weight",
        up=f"{LAYER}.mlp.shared_expert.up_proj.weight",
    ),
    Rename(
        f"{MEGATRON_LAYER}.mlp.shared_experts.linear_fc2.weight",
        with_shared_experts,
        hf=f"{LAYER}.mlp.shared_expert.down_proj.weight",
    ),
)


MEGATRON_EXT = Architecture(
    name="megatron_ext",
    hf_class="MegatronExtForCausalLM",
    model_type="megatron_ext",
    config=CONFIG,
    weights=llama.TRUNK + llama.DENSE_FFN + MOE_FFN,
    code=("configuration_megatron_ext.py", "modeling_megatron_ext.py"),
    auto_map=(
        ("AutoConfig", "configuration_megatron_ext.MegatronExtConfig"),
        ("AutoModelForCausalLM", "modeling_megatron_ext.MegatronExtForCausalLM"),
    ),
)
