"""What the model is: the architecture, in Megatron's field names, without anything about how it is trained or split."""

import math
from typing import Annotated, Any, Literal

from pydantic import Field

from megatron_ext.config.base import config


@config
class GatingNormalization:
    """Gating-logit normalization (Skywork-MoE, arXiv 2406.06563, section 4.1, eq. 6; Tanuki-8x8B).

    Each token's E router logits z become `scale * (z - mean(z)) / (std(z) + eps)` before the score function, in
    training and in inference.
    """

    scale: float = Field(default=1.0, gt=0)
    """The paper's lambda: how sharp the normalized distribution is."""
    eps: float = Field(default=1e-5, gt=0)
    """Added to the standard deviation."""
    correction: Literal[0, 1] = 1
    """1: sample standard deviation (Skywork's and Tanuki's code); 0: population standard deviation."""


TRAINING_ONLY = frozenset(
    "account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split apply_rope_fusion "
    "async_tensor_model_parallel_allreduce barrier_with_L1_time batch_p2p_sync bias_activation_fusion "
    "bias_dropout_fusion config_logger_dir cpu_offloading cpu_offloading_activations cpu_offloading_num_layers "
    "cpu_offloading_weights cross_entropy_fusion_impl cross_entropy_loss_fusion deallocate_pipeline_outputs "
    "defer_embedding_wgrad_compute delay_wgrad_compute deterministic_mode distribute_saved_activations "
    "gradient_accumulation_fusion hidden_dropout masked_softmax_fusion memory_efficient_layer_norm "
    "microbatch_group_size_per_vp_stage moe_deepep_num_sms moe_layer_recompute moe_per_layer_logging "
    "moe_permute_fusion moe_router_fusion moe_shared_expert_overlap moe_z_loss_coeff "
    "num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage overlap_moe_expert_parallel_comm "
    "overlap_p2p_comm_warmup_flush persist_layer_norm pipeline_model_parallel_layout tp_comm_atomic_ag "
    "tp_comm_atomic_rs tp_comm_bulk_dgrad tp_comm_bulk_wgrad tp_comm_overlap tp_comm_overlap_ag "
    "tp_comm_overlap_disable_fc1 tp_comm_overlap_disable_qkv tp_comm_overlap_rs tp_comm_overlap_rs_dgrad "
    "tp_comm_split_ag tp_comm_split_rs wgrad_deferral_limit".split()
)
"""Overrides of megatron-core's fields that leave the logits of a trained model alone."""


@config
class ModelConfig:
    """A decoder-only transformer: Llama-shaped, dense or Mixture-of-Experts."""

    num_layers: int = Field(ge=1)
    """Transformer layers."""
    hidden_size: int = Field(ge=1)
    """Width of the residual stream."""
    ffn_hidden_size: int = Field(ge=1)
    """Intermediate width of a dense feed-forward layer."""
    num_attention_heads: int = Field(ge=1)
    """Query heads."""
    vocab_size: int = Field(ge=1)
    """Tokens the tokenizer knows. The embedding is padded to a multiple of `make_vocab_size_divisible_by`."""
    num_query_groups: int | None = Field(default=None, ge=1)
    """Key/value heads (grouped-query attention). Default: as many as query heads."""
    kv_channels: int | None = Field(default=None, ge=1)
    """Width of one head. Default: hidden_size / num_attention_heads."""
    max_position_embeddings: int = Field(default=4096, ge=1)
    """Longest sequence the model is declared for; exported to Hugging Face."""
    rotary_base: float = Field(default=10000.0, gt=0)
    """RoPE theta."""
    layernorm_epsilon: float = Field(default=1e-5, gt=0)
    """Epsilon of every RMSNorm."""
    untie_embeddings_and_output_weights: bool = True
    """False: the output layer uses the input embedding's weights."""
    init_method_std: float = Field(default=0.02, gt=0)
    """Standard deviation of initial weights; layers that write to the residual stream: it / sqrt(2 * num_layers)."""
    make_vocab_size_divisible_by: int = Field(default=128, ge=1)
    """The padded vocabulary is a multiple of this, whatever the tensor-parallel size, so that layouts can change."""

    num_moe_experts: int | None = Field(default=None, ge=2)
    """Routed experts of a MoE layer. Unset: every layer is dense."""
    moe_ffn_hidden_size: int | None = Field(default=None, ge=1)
    """Intermediate width of one routed expert. Default: ffn_hidden_size."""
    moe_router_topk: int = Field(default=2, ge=1)
    """Experts each token is sent to."""
    moe_router_pre_softmax: bool = False
    """False: softmax over the selected experts, weights sum to 1 (Mixtral). True: softmax over all (Qwen2-MoE)."""
    moe_router_topk_scaling_factor: float | None = Field(default=None, gt=0)
    """Factor on the selected experts' weights (DeepSeek's routed_scaling_factor)."""
    moe_gating_normalization: GatingNormalization | None = None
    """Normalize each token's router logits before the score function. `{}` takes Skywork's and Tanuki's values."""
    moe_shared_expert_intermediate_size: int | None = Field(default=None, ge=1)
    """Total intermediate width of the shared experts that every token passes through."""
    moe_first_k_dense: int = Field(default=0, ge=0)
    """The first k layers stay dense (DeepSeek's first_k_dense_replace)."""
    moe_layer_freq: Annotated[int, Field(ge=1)] | list[Literal[0, 1]] = 1
    """n: every n-th layer is MoE, starting with layer 0. A list with one entry a layer: 1 is MoE, 0 is dense."""
    moe_router_load_balancing_type: Literal["aux_loss", "none"] = "aux_loss"
    """Balance loss: `aux_loss` is the Switch Transformer's over each micro-batch."""
    moe_aux_loss_coeff: float = Field(default=0.0, ge=0)
    """Weight of the balance loss of each MoE layer."""

    transformer_overrides: dict[str, Any] = Field(default_factory=dict)
    """Escape hatch: fields of megatron.core's TransformerConfig set as they are, checked against its names."""

    @property
    def function_overrides(self) -> dict[str, Any]:
        """The overrides that may change what a trained model computes."""
        return {name: value for name, value in self.transformer_overrides.items() if name not in TRAINING_ONLY}

    @property
    def is_moe(self) -> bool:
        """Whether any layer has routed experts."""
        return self.num_moe_experts is not None and any(self.moe_layer_pattern)

    @property
    def moe_layer_pattern(self) -> list[bool]:
        """For each layer, whether it is MoE."""
        if self.num_moe_experts is None:
            return [False] * self.num_layers
        if isinstance(self.moe_layer_freq, list):
            pattern = [bool(x) for x in self.moe_layer_freq]
        else:
            pattern = [layer % self.moe_layer_freq == 0 for layer in range(self.num_layers)]
        return [moe and layer >= self.moe_first_k_dense for layer, moe in enumerate(pattern)]

    @property
    def query_groups(self) -> int:
        """Key/value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def expert_ffn_hidden_size(self) -> int:
        """Intermediate width of one routed expert."""
        return self.moe_ffn_hidden_size or self.ffn_hidden_size

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding."""
        return math.ceil(self.vocab_size / self.make_vocab_size_divisible_by) * self.make_vocab_size_divisible_by
