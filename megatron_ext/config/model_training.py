"""Fields of `model:` that only its training reads: the logits of the trained model do not depend on them."""

from typing import Annotated

from pydantic import Field

from megatron_ext.config.base import config
from megatron_ext.config.effect import training_only
from megatron_ext.config.routing import AdaptiveAuxLoss, BalanceLoss, DropPolicy


@config
class DenseTraining:
    """What training reads of any model."""

    attention_dropout: float = training_only(default=0.0, ge=0, lt=1)
    """Share of attention weights dropped in training."""
    hidden_dropout: float = training_only(default=0.0, ge=0, lt=1)
    """Share of the embedding and of each layer's outputs dropped in training."""
    init_method_std: float = training_only(default=0.02, gt=0)
    """Standard deviation of initial weights; layers that write to the residual stream: it / sqrt(2 * num_layers)."""
    output_z_loss_coeff: float = training_only(default=0.0, ge=0)
    """Weight of log(Z)^2 of the output softmax, mean over tokens (PaLM: 1e-4)."""


@config
class ExpertTraining:
    """What training reads of a model with experts."""

    moe_router_load_balancing_type: BalanceLoss | list[BalanceLoss] = training_only(default="aux_loss")
    """Balance loss over each micro-batch, each sequence (seq_) or the global batch (global_); or a list of them."""
    moe_aux_loss_coeff: Annotated[float, Field(ge=0)] | list[Annotated[float, Field(ge=0)]] = training_only(default=0.0)
    """Weight of the balance loss of each MoE layer; a list where the type is one."""
    moe_adaptive_aux_loss: AdaptiveAuxLoss | None = training_only(default=None)
    """Let each layer's coefficient follow its drop rate, from moe_aux_loss_coeff on. `{}` takes Skywork's values."""
    moe_z_loss_coeff: float = training_only(default=0.0, ge=0)
    """Weight of the router z-loss (ST-MoE, arXiv 2202.08906, eq. 5), of the logits before normalization."""
    moe_expert_capacity_factor: float | None = training_only(default=None, gt=0)
    """In training an expert takes at most this times the mean load; further tokens are dropped. Unset: dropless."""
    moe_token_drop_policy: DropPolicy = training_only(default="probs")
    """Which tokens an expert over its capacity drops: those with the smallest weights, or the last ones."""
    moe_pad_expert_input_to_capacity: bool = training_only(default=False)
    """Fill each expert up to its capacity with rows of zeros: its products have the same shapes in every step, and the
    host never waits to know them. Where experts are on one rank; nothing that is learned changes."""
    moe_router_bias_update_rate: float = training_only(default=1e-3, gt=0)
    """How far a step moves the bias of an expert whose load is above or below the mean."""

    @property
    def balance_losses(self) -> dict[str, float]:
        """Coefficient of each kind of balance loss that is used."""
        kinds, weights = self.moe_router_load_balancing_type, self.moe_aux_loss_coeff
        kinds = [kinds] if isinstance(kinds, str) else kinds
        weights = [weights] * len(kinds) if isinstance(weights, float | int) else weights
        return {kind: float(weight) for kind, weight in zip(kinds, weights, strict=False) if kind != "none"}
