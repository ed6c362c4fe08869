"""Tanuki-8x8B: Mixtral with gating-logit normalization, `TanukiForCausalLM`; its code is in a public repository.

The gate is that of the team's inference code (team-hatakeyama-phase2/vllm, `models/tanuki.py`): each token's logits
less their mean, over their sample standard deviation plus 1e-5, then Mixtral's.
"""

from megatron_ext.architectures import mixtral
from megatron_ext.architectures.tables.base import Architecture
from megatron_ext.architectures.tables.experts import moe_only
from megatron_ext.architectures.tables.fields import Always, Field
from megatron_ext.config import GatingNormalization

REPOSITORY = "weblab-GENIAC/Tanuki-8x8B-dpo-v1.0"

TANUKI = Architecture(
    name="tanuki",
    hf_class="TanukiForCausalLM",
    model_type="Tanuki",
    config=(
        *(rule for rule in mixtral.CONFIG if "num_experts_per_tok" not in rule.hf_names()),
        Field("num_experts_per_tok", "moe_router_topk", also=("num_experts_per_topk",), default=2),
        Always("moe_gating_normalization", GatingNormalization(scale=1.0, eps=1e-5, correction=1)),
    ),
    weights=mixtral.MIXTRAL.weights,
    extra_check=moe_only,
    stacked=mixtral.MIXTRAL.stacked,
    aliases=mixtral.MIXTRAL.aliases,
    reads_like="mixtral",
    remote=REPOSITORY,
    auto_map=(
        ("AutoConfig", f"{REPOSITORY}--configuration_tanuki.TanukiConfig"),
        ("AutoModelForCausalLM", f"{REPOSITORY}--modeling_tanuki.TanukiForCausalLM"),
    ),
)
