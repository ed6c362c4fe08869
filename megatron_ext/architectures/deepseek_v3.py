"""DeepSeek-V3: V2 with sigmoid scores, a bias that balances, and groups by their two best: `DeepseekV3ForCausalLM`."""

import torch

from megatron_ext.architectures.deepseek_v2 import LATENT_CONFIG, LATENT_WEIGHTS
from megatron_ext.architectures.tables.attention_fields import NoGroups
from megatron_ext.architectures.tables.base import Architecture
from megatron_ext.architectures.tables.experts import MEGATRON_MLP, moe_only, stacked_experts
from megatron_ext.architectures.tables.fields import Always, Field, Fixed, Ignored
from megatron_ext.architectures.tables.llama_shape import LAYER
from megatron_ext.architectures.tables.routing_fields import (
    FirstDense,
    GroupLimited,
    Scaling,
    SharedCount,
    SigmoidScores,
)
from megatron_ext.architectures.tables.rules import Rename, in_moe_layers
from megatron_ext.architectures.tables.storage_variants import Drop

DEEPSEEK_V3 = Architecture(
    name="deepseek_v3",
    hf_class="DeepseekV3ForCausalLM",
    model_type="deepseek_v3",
    config=(
        *LATENT_CONFIG,
        Field("max_position_embeddings", "max_position_embeddings", default=4096),
        NoGroups("num_key_value_heads", default=128),
        SharedCount(default=1),
        FirstDense(default=3),
        SigmoidScores(),
        Scaling(default=2.5),
        GroupLimited("top2_sum", method="noaux_tc", default=(8, 4)),
        Always("moe_router_enable_expert_bias", True),
        Fixed("rope_interleave", True),
        # How many layers for multi-token prediction come after the others: no part of the next token's logits.
        Ignored(("num_mtp_layers", "num_nextn_predict_layers"), writes=(("num_nextn_predict_layers", 0),)),
    ),
    weights=(
        *LATENT_WEIGHTS,
        Rename(
            f"{MEGATRON_MLP}.router.expert_bias",
            in_moe_layers,
            dtype=torch.float32,
            hf=f"{LAYER}.mlp.gate.e_score_correction_bias",
        ),
    ),
    extra_check=moe_only,
    stacked=stacked_experts(),
    drops=(Drop(f"{LAYER}.*", "a layer that predicts further tokens", beside=f"{LAYER}.eh_proj.weight"),),
)
