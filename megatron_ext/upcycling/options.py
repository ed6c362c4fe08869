"""What an upcycling is asked for, and the model that makes."""

from dataclasses import replace
from typing import Literal

from pydantic import Field

from megatron_ext.config import GatingNormalization, ModelConfig
from megatron_ext.config.base import config


@config
class UpcycleOptions:
    """Options of this command."""

    source: str
    """Dense Megatron checkpoint, or a directory of checkpoints (the newest is taken)."""
    target: str
    """Directory to write; the MoE checkpoint becomes its iter_0000000."""
    method: Literal["copy"] = "copy"
    """copy: every expert starts as the dense feed-forward layer, a shared expert starts silent."""
    num_experts: int = Field(ge=2)
    """Routed experts."""
    topk: int = Field(default=2, ge=1)
    """Experts a token is sent to."""
    pre_softmax: bool = False
    """Softmax over all experts before the selection, as topk 1 needs. The function is then not kept."""
    shared_expert_size: int | None = Field(default=None, ge=1)
    """Intermediate width of a shared expert."""
    gating_normalization: bool = True
    """Normalize each token's router logits (Skywork-MoE)."""
    first_k_dense: int = Field(default=0, ge=0)
    """Leave the first k layers dense."""
    seed: int = Field(default=1234, ge=0)
    """Seed of the routers."""
    text: str | None = None
    """Text or prepared dataset for the function check. Default: built-in sentences."""
    tokenizer: str | None = None
    """Tokenizer for the text. Default: the checkpoint's own."""
    figures: str | None = None
    """JSON file for the figures of the function check."""
    force: bool = False
    """Replace an existing target."""

    def moe_model(self, dense: ModelConfig) -> ModelConfig:
        """The configuration of the model to make of `dense`."""
        return replace(
            dense,
            num_moe_experts=self.num_experts,
            moe_router_topk=self.topk,
            moe_router_pre_softmax=self.pre_softmax,
            moe_shared_expert_intermediate_size=self.shared_expert_size,
            moe_gating_normalization=GatingNormalization() if self.gating_normalization else None,
            moe_first_k_dense=self.first_k_dense,
        )
