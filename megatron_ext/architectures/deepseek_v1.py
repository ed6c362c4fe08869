"""DeepSeekMoE, the first version: Llama's attention, shared and fine-grained experts: `DeepseekForCausalLM`.

Transformers has no such class; the code is in the public repositories of the models. It was written for transformers 4.
"""

from megatron_ext.architectures.tables.attention_fields import Activation, Groups, HeadWidth
from megatron_ext.architectures.tables.base import Architecture
from megatron_ext.architectures.tables.experts import moe_only, routed_experts, shared_experts, stacked_experts
from megatron_ext.architectures.tables.fields import Field, Fixed
from megatron_ext.architectures.tables.llama_shape import DENSE_FFN, DROPS, LAYER, SIZES, TRUNK
from megatron_ext.architectures.tables.rope import Rope
from megatron_ext.architectures.tables.routing_fields import DeepSeekBalance, FirstDense, NormalizedTopK, SharedCount

REPOSITORY = "deepseek-ai/deepseek-moe-16b-base"

DEEPSEEK_V1 = Architecture(
    name="deepseek_v1",
    hf_class="DeepseekForCausalLM",
    model_type="deepseek",
    config=(
        *SIZES,
        Field("intermediate_size", "ffn_hidden_size"),
        Groups(),
        HeadWidth("derived"),
        Field("max_position_embeddings", "max_position_embeddings", default=2048),
        Field("rms_norm_eps", "layernorm_epsilon", default=1e-6),
        Activation("hidden_act"),
        Fixed("attention_bias", False),
        Rope(scalings=("default", "linear", "dynamic"), type_only=True, partial=None),
        Field("n_routed_experts", "num_moe_experts", required=True),
        Field("num_experts_per_tok", "moe_router_topk", required=True),
        Field("moe_intermediate_size", "expert_ffn_hidden_size", settable="moe_ffn_hidden_size", required=True),
        SharedCount(default=None),
        FirstDense(default=0, every=False),
        Fixed("scoring_func", "softmax"),
        NormalizedTopK(),
        DeepSeekBalance(),
    ),
    weights=(*TRUNK, *DENSE_FFN, *routed_experts(), *shared_experts(f"{LAYER}.mlp.shared_experts")),
    extra_check=moe_only,
    auto_map=(
        ("AutoConfig", f"{REPOSITORY}--configuration_deepseek.DeepseekConfig"),
        ("AutoModel", f"{REPOSITORY}--modeling_deepseek.DeepseekModel"),
        ("AutoModelForCausalLM", f"{REPOSITORY}--modeling_deepseek.DeepseekForCausalLM"),
    ),
    remote=REPOSITORY,
    reads="table",
    stacked=stacked_experts(),
    drops=DROPS,
)
