"""What the model is: the architecture, in Megatron's field names, without anything about how it is trained or split."""

import math
from typing import Annotated, Any, Literal

from pydantic import Field

from megatron_ext.config.attention import DynamicRopeScaling, MultiLatentAttention, RopeScaling
from megatron_ext.config.base import config
from megatron_ext.config.routing import AdaptiveAuxLoss, BalanceLoss, GatingNormalization, RouterNoise

TRAINING_ONLY = frozenset(
    "account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split apply_rope_fusion "
    "async_tensor_model_parallel_allreduce barrier_with_L1_time batch_p2p_sync bias_activation_fusion "
    "bias_dropout_fusion config_logger_dir cpu_offloading cpu_offloading_activations cpu_offloading_num_layers "
    "cpu_offloading_weights cross_entropy_fusion_impl cross_entropy_loss_fusion deallocate_pipeline_outputs "
    "defer_embedding_wgrad_compute delay_wgrad_compute deterministic_mode distribute_saved_activations "
    "gradient_accumulation_fusion masked_softmax_fusion memory_efficient_layer_norm "
    "microbatch_group_size_per_vp_stage moe_deepep_num_sms moe_layer_recompute "
    "moe_permute_fusion moe_shared_expert_overlap "
    "num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage overlap_moe_expert_parallel_comm "
    "overlap_p2p_comm_warmup_flush persist_layer_norm pipeline_model_parallel_layout tp_comm_atomic_ag "
    "tp_comm_atomic_rs tp_comm_bulk_dgrad tp_comm_bulk_wgrad tp_comm_overlap tp_comm_overlap_ag "
    "tp_comm_overlap_disable_fc1 tp_comm_overlap_disable_qkv tp_comm_overlap_rs tp_comm_overlap_rs_dgrad "
    "tp_comm_split_ag tp_comm_split_rs wgrad_deferral_limit".split()
)
"""Overrides of megatron-core's fields that leave the logits of a trained model alone."""


@config
class ModelConfig:
    """A decoder-only transformer, dense or Mixture-of-Experts. The defaults are Llama's shape."""

    num_layers: int = Field(ge=1, le=100_000)
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
    position_embedding_type: Literal["rope", "learned_absolute"] = "rope"
    """rope: rotary. learned_absolute: one learned vector a position, added to the embedding (GPT-2)."""
    rotary_base: float = Field(default=10000.0, gt=0)
    """RoPE theta."""
    rotary_percent: float = Field(default=1.0, gt=0, le=1)
    """Share of a head's width that is rotated (GPT-NeoX)."""
    rope_scaling: RopeScaling | None = None
    """Extension of RoPE beyond the length the model was first trained for."""
    multi_latent_attention: MultiLatentAttention | None = None
    """Multi-head latent attention (DeepSeek-V2 and V3) instead of grouped-query attention."""
    qk_layernorm: Literal["head", "projection"] | None = None
    """Norm of queries and keys: `head` over each head's width (Qwen3), `projection` over all heads (OLMoE)."""
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    """Kind of every norm."""
    layernorm_epsilon: float = Field(default=1e-5, gt=0)
    """Epsilon of every norm."""
    activation_func: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    """Activation of feed-forward networks; gelu_tanh is the approximation of GPT-2 (gelu_new)."""
    gated_linear_unit: bool = True
    """Feed-forward networks multiply the activated projection by a second one (SwiGLU, GeGLU)."""
    add_bias_linear: bool = False
    """Biases in every linear layer of attention and feed-forward networks, routed experts included."""
    add_qkv_bias: bool = False
    """Biases in the query, key and value projections (Qwen2); implied by add_bias_linear."""
    attention_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of attention weights dropped in training."""
    hidden_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the embedding and of each layer's outputs dropped in training."""
    embedding_scale: float = Field(default=1.0, gt=0)
    """Factor on the token embedding (Gemma: sqrt(hidden_size))."""
    output_z_loss_coeff: float = Field(default=0.0, ge=0)
    """Weight of log(Z)^2 of the output softmax, mean over tokens (PaLM: 1e-4)."""
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
    moe_router_score_function: Literal["softmax", "sigmoid"] = "softmax"
    """How logits become scores. sigmoid is DeepSeek-V3's."""
    moe_router_pre_softmax: bool = False
    """False: softmax over the selected experts, weights sum to 1 (Mixtral). True: softmax over all (Qwen2-MoE)."""
    moe_router_norm_topk_prob: bool | None = None
    """Divide the selected scores by their sum. Default: with sigmoid. After a softmax over all experts: Qwen3-MoE."""
    moe_router_topk_scaling_factor: float | None = Field(default=None, gt=0)
    """Factor on the selected experts' weights (DeepSeek's routed_scaling_factor)."""
    moe_router_num_groups: int | None = Field(default=None, ge=2)
    """Group-limited routing: experts form this many groups, and tokens go to experts of the best groups only."""
    moe_router_group_topk: int | None = Field(default=None, ge=1)
    """Groups each token may be sent to."""
    moe_router_group_score: Literal["top2_sum", "max"] = "top2_sum"
    """A group's score: the sum of its two best experts (DeepSeek-V3) or its best (DeepSeek-V2)."""
    moe_router_enable_expert_bias: bool = False
    """Balance without auxiliary loss (DeepSeek-V3, arXiv 2412.19437, section 2.1.2): a bias that only selects."""
    moe_router_bias_update_rate: float = Field(default=1e-3, gt=0)
    """How far a step moves the bias of an expert whose load is above or below the mean."""
    moe_router_noise: RouterNoise | None = None
    """Noisy gating, in training only."""
    moe_gating_normalization: GatingNormalization | None = None
    """Normalize each token's router logits before the score function. `{}` takes Skywork's and Tanuki's values."""
    moe_expert_capacity_factor: float | None = Field(default=None, gt=0)
    """In training an expert takes at most this times the mean load; further tokens are dropped. Unset: dropless."""
    moe_token_drop_policy: Literal["probs", "position"] = "probs"
    """Which tokens an expert over its capacity drops: those with the smallest weights, or the last ones."""
    moe_shared_expert_intermediate_size: int | None = Field(default=None, ge=1)
    """Total intermediate width of the shared experts that every token passes through."""
    moe_shared_expert_gate: bool = False
    """Multiply the shared experts' output by the sigmoid of a learned gate (Qwen2-MoE)."""
    moe_first_k_dense: int = Field(default=0, ge=0)
    """The first k layers stay dense (DeepSeek's first_k_dense_replace)."""
    moe_layer_freq: Annotated[int, Field(ge=1)] | list[Literal[0, 1]] = 1
    """n: every n-th layer is MoE, starting with layer 0. A list with one entry a layer: 1 is MoE, 0 is dense."""
    moe_router_load_balancing_type: BalanceLoss | list[BalanceLoss] = "aux_loss"
    """Balance loss over each micro-batch, each sequence (seq_) or the global batch (global_); or a list of them."""
    moe_aux_loss_coeff: Annotated[float, Field(ge=0)] | list[Annotated[float, Field(ge=0)]] = 0.0
    """Weight of the balance loss of each MoE layer; a list where the type is one."""
    moe_adaptive_aux_loss: AdaptiveAuxLoss | None = None
    """Let each layer's coefficient follow its drop rate, from moe_aux_loss_coeff on. `{}` takes Skywork's values."""
    moe_z_loss_coeff: float = Field(default=0.0, ge=0)
    """Weight of the router z-loss (ST-MoE, arXiv 2202.08906, eq. 5), of the logits before normalization."""

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
        """Width of one attention head's query and key."""
        if self.multi_latent_attention is not None:
            return self.multi_latent_attention.qk_head_dim + self.multi_latent_attention.qk_pos_emb_head_dim
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def latent_norm_epsilon(self) -> float:
        """Epsilon of the norms of latent vectors."""
        stated = None if self.multi_latent_attention is None else self.multi_latent_attention.latent_norm_epsilon
        return self.layernorm_epsilon if stated is None else stated

    @property
    def rotary_width(self) -> int:
        """Width of the part of a head's query and key that is rotated."""
        if self.multi_latent_attention is not None:
            return self.multi_latent_attention.qk_pos_emb_head_dim
        return int(self.head_dim * self.rotary_percent)

    @property
    def length_shapes_model(self) -> bool:
        """Whether `max_position_embeddings` is part of what the model computes, and not only declared."""
        return self.position_embedding_type == "learned_absolute" or isinstance(self.rope_scaling, DynamicRopeScaling)

    @property
    def balance_losses(self) -> dict[str, float]:
        """Coefficient of each kind of balance loss that is used."""
        kinds, weights = self.moe_router_load_balancing_type, self.moe_aux_loss_coeff
        kinds = [kinds] if isinstance(kinds, str) else kinds
        weights = [weights] * len(kinds) if isinstance(weights, float | int) else weights
        return {kind: float(weight) for kind, weight in zip(kinds, weights, strict=False) if kind != "none"}

    @property
    def normalizes_topk(self) -> bool:
        """Whether the selected experts' scores are divided by their sum."""
        if self.moe_router_norm_topk_prob is None:
            return self.moe_router_score_function == "sigmoid" and self.moe_router_topk > 1
        return self.moe_router_norm_topk_prob

    @property
    def has_qkv_bias(self) -> bool:
        """Whether query, key and value projections have biases."""
        return self.add_qkv_bias or self.add_bias_linear

    @property
    def has_dense_layers(self) -> bool:
        """Whether any layer has a dense feed-forward network."""
        return not all(self.moe_layer_pattern)

    @property
    def expert_ffn_hidden_size(self) -> int:
        """Intermediate width of one routed expert."""
        return self.moe_ffn_hidden_size or self.ffn_hidden_size

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding."""
        return math.ceil(self.vocab_size / self.make_vocab_size_divisible_by) * self.make_vocab_size_divisible_by
