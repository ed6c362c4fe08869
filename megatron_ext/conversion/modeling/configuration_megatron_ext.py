"""Configuration of a megatron_ext model: Llama's, plus how its experts are arranged and routed."""

from transformers.models.llama.configuration_llama import LlamaConfig


class MegatronExtConfig(LlamaConfig):
    """Llama's configuration with Mixture-of-Experts fields; without `num_experts` every layer is dense."""

    model_type = "megatron_ext"

    def __init__(
        self,
        num_experts=None,
        num_experts_per_tok=2,
        moe_intermediate_size=None,
        shared_expert_intermediate_size=None,
        moe_layer_pattern=None,
        softmax_before_topk=False,
        routed_scaling_factor=None,
        gating_normalization=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.moe_intermediate_size = moe_intermediate_size or self.intermediate_size
        self.shared_expert_intermediate_size = shared_expert_intermediate_size
        # One entry a layer: 1 is MoE, 0 is dense.
        self.moe_layer_pattern = moe_layer_pattern or [int(num_experts is not None)] * self.num_hidden_layers
        # True: softmax over all experts, then select. False: the selected experts' weights sum to 1.
        self.softmax_before_topk = softmax_before_topk
        self.routed_scaling_factor = routed_scaling_factor
        # {"scale", "eps", "correction"}: each token's router logits are standardised over the experts, then scaled.
        self.gating_normalization = gating_normalization
