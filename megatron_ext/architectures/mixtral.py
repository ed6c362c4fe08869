"""Mixtral: every layer has experts, whose weights sum to 1: `MixtralForCausalLM`."""

from megatron_ext.architectures.tables.attention_fields import Activation, Groups, HeadWidth
from megatron_ext.architectures.tables.base import Architecture
from megatron_ext.architectures.tables.experts import moe_only, routed_experts, stacked_experts
from megatron_ext.architectures.tables.fields import ConfigRule, Field
from megatron_ext.architectures.tables.llama_shape import LAYER, SIZES, TRUNK
from megatron_ext.architectures.tables.rope import Rope
from megatron_ext.architectures.tables.routing_fields import EveryLayerMoe, ExpertWidth, SumsToOne
from megatron_ext.architectures.tables.storage_variants import Alias
from megatron_ext.architectures.tables.window_fields import SlidingWindow

BLOCK = f"{LAYER}.block_sparse_moe"
POSITIONS = 131072
NAMES = {"gate": "w1", "up": "w3", "down": "w2"}

CONFIG: tuple[ConfigRule, ...] = (
    *SIZES,
    ExpertWidth("intermediate_size"),
    Groups(default=8),
    HeadWidth(),
    Field("max_position_embeddings", "max_position_embeddings", default=POSITIONS),
    Field("rms_norm_eps", "layernorm_epsilon", default=1e-5),
    Activation("hidden_act"),
    SlidingWindow(),
    Rope(theta=1e6, partial=None),
    Field("num_local_experts", "num_moe_experts", default=8),
    Field("num_experts_per_tok", "moe_router_topk", default=2),
    EveryLayerMoe(),
    SumsToOne(),
)

MIXTRAL = Architecture(
    name="mixtral",
    hf_class="MixtralForCausalLM",
    model_type="mixtral",
    config=CONFIG,
    weights=TRUNK + routed_experts(BLOCK, **NAMES),
    extra_check=moe_only,
    stacked=stacked_experts(BLOCK, **NAMES),
    aliases=(Alias(f"{BLOCK}.gate.weight", other=f"{LAYER}.mlp.gate.weight"),),
)
