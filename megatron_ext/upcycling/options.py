"""What an upcycling is asked for, and the model that makes.

No torch here, nor in what this imports: `--help` answers at once.
"""

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from megatron_ext.config import GatingNormalization, ModelConfig
from megatron_ext.config.base import PathName, config
from megatron_ext.model_io.options import default_workers
from megatron_ext.upcycling.methods.copy import Copy
from megatron_ext.upcycling.methods.drop import Drop
from megatron_ext.upcycling.methods.fine_grained import FineGrained
from megatron_ext.upcycling.methods.mix import Mix
from megatron_ext.upcycling.methods.noise import Noise
from megatron_ext.upcycling.methods.qwen import Shuffle
from megatron_ext.upcycling.methods.shared_routed import SharedRouted

AnyMethod = Annotated[Copy | FineGrained | SharedRouted | Drop | Noise | Shuffle | Mix, Field(discriminator="kind")]


@config
class UpcycleOptions:
    """Options of this command."""

    sources: list[PathName] = Field(min_length=1)
    """Dense models: Megatron checkpoints (of a directory, the newest) or Hugging Face directories."""
    target: PathName
    """Directory to write."""
    to: Literal["megatron", "hf"] = "megatron"
    """Format of the target: a checkpoint to train, or a Hugging Face directory."""
    method: AnyMethod = Field(default_factory=Copy)
    """How experts are made."""
    num_experts: int | None = Field(default=None, ge=2)
    """Routed experts. Left out, --layers makes a deeper model of the source's kind."""
    topk: int = Field(default=2, ge=1)
    """Experts a token is sent to."""
    expert_size: int | None = Field(default=None, ge=1)
    """Intermediate width of a routed expert. Default: what the method makes of the dense layer."""
    shared_expert_size: int | None = Field(default=None, ge=1)
    """Intermediate width of a shared expert."""
    shared_expert_gate: bool = False
    """Give the shared expert a gate (Qwen2-MoE); it starts half open."""
    gating_normalization: bool = True
    """Normalize each token's router logits (Skywork-MoE)."""
    score_function: Literal["softmax", "sigmoid"] = "softmax"
    """How logits become scores."""
    expert_bias: bool = False
    """Choose experts by scores plus a bias that balances them without a loss (DeepSeek-V3)."""
    router_bias: bool = False
    """Give the router's logits a bias (gpt-oss); it starts at 0."""
    pre_softmax: bool = False
    """Softmax over all experts before the selection, as topk 1 needs. The function is then kept only if the scores are
    divided by their sum."""
    norm_topk_prob: bool | None = None
    """Divide the selected scores by their sum. Default: with sigmoid."""
    scaling_factor: float | None = Field(default=None, gt=0)
    """Factor on the routing weights; the experts make up for it. Default: what the method needs."""
    first_k_dense: int = Field(default=0, ge=0)
    """Leave the first k layers dense."""
    layer_freq: int = Field(default=1, ge=1)
    """Make every n-th layer MoE, starting with layer 0."""
    layers: str | None = None
    """Build the model from these layers of the source first, such as 0-23,8-31 (depth up-scaling)."""
    router_init: Literal["normal", "uniform", "activations"] = "normal"
    """normal, uniform: drawn around 0. activations: directions of clusters of what the dense layers see on --text, so
    that experts start to specialise at once."""
    router_std: float | None = Field(default=None, gt=0)
    """Standard deviation of drawn routers. Default: the model's init_method_std."""
    seed: int = Field(default=1234, ge=0)
    """Seed of everything that is drawn."""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Convert the weights. Default: the first source's."""
    text: PathName | None = None
    """Text or prepared dataset for the function check and for router_init. Default: built-in sentences."""
    tokenizer: PathName | None = None
    """Tokenizer for the text. Default: the first source's."""
    logits: bool = True
    """Compare the logits of the dense and of the MoE model; both are loaded in fp32. --no-logits leaves that out."""
    tolerance: float | None = Field(default=None, gt=0)
    """Largest difference of logits, relative to the largest logit, that a method which keeps the function may make.
    Default: 1e-5."""
    figures: PathName | None = None
    """JSON file for the figures of the function check."""
    workers: int = Field(default_factory=default_workers, ge=1)
    """Threads. The result does not depend on them. Default: one for each core, up to 4."""
    check: bool = False
    """Only print the plan: where each tensor comes from, parameters, what is expected of the function."""
    force: bool = False
    """Replace an existing target and the training configuration beside it."""

    def model_of(self, dense: ModelConfig) -> ModelConfig:
        """The configuration of the model to make of `dense`."""
        if self.num_experts is None:
            return dense
        changes: dict[str, Any] = {
            "num_moe_experts": self.num_experts,
            "moe_router_topk": self.topk,
            "moe_ffn_hidden_size": self.expert_size,
            "moe_router_score_function": self.score_function,
            "moe_router_linear_bias": self.router_bias,
            "moe_router_enable_expert_bias": self.expert_bias,
            "moe_router_pre_softmax": self.pre_softmax,
            "moe_router_norm_topk_prob": self.norm_topk_prob,
            "moe_router_topk_scaling_factor": self.scaling_factor,
            "moe_shared_expert_intermediate_size": self.shared_expert_size,
            "moe_shared_expert_gate": self.shared_expert_gate,
            "moe_gating_normalization": GatingNormalization() if self.gating_normalization else None,
            "moe_first_k_dense": self.first_k_dense,
            "moe_layer_freq": self.layer_freq,
        }
        return self.method.adjust(replace(dense, **changes), dense)
