"""Known faults of the installed megatron-core: which it has, and what this framework does about each.

`mended`: our code takes the place of the faulty one. `avoided`: a combination that triggers it is never built.
`refused`: a user who asks for it gets an error with the way out. Every entry has a test that shows the fault in the
versions listed here, and fails when an installed version no longer has it.
"""

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from packaging.version import Version

from megatron_ext.errors import EnvironmentFault

OLDEST, TOO_NEW = Version("0.16.1"), Version("0.20")


@dataclass(frozen=True)
class Fault:
    """One fault and the answer to it."""

    name: str
    what: str
    answer: Literal["mended", "avoided", "refused"]
    how: str
    """What we do, or what the user should do instead."""
    fixed_in: str | None = None
    """First version without it."""
    overrides: tuple[str, ...] = ()
    """TransformerConfig fields that would bring it back; refused in model.transformer_overrides."""

    def present_in(self, version: Version) -> bool:
        """Whether `version` of megatron-core has this fault."""
        return self.fixed_in is None or version < Version(self.fixed_in)


FAULTS: tuple[Fault, ...] = (
    Fault(
        "expert_gradients_of_wrong_group",
        "MoE with TP > 1, EP = 1 and ETP != TP: expert gradients are reduced over the wrong group, silently",
        "refused",
        "leave expert_tensor_parallel_size unset or raise expert_model_parallel_size (config/rules.py)",
        fixed_in="0.19.0",
    ),
    Fault(
        "interleaved_batched_messages",
        "two pipeline stages with several chunks and batched messages: activations and gradients are swapped",
        "avoided",
        "the interleaved schedule always uses overlapped messages (mcore/transformer_config.py)",
        overrides=("batch_p2p_comm", "overlap_p2p_comm"),
    ),
    Fault(
        "moe_needs_sequence_parallelism",
        "MoE layers refuse to train under TP without sequence parallelism, after start-up",
        "refused",
        "set parallel.sequence_parallel: true (config/rules.py)",
    ),
    Fault(
        "per_token_balance_loss_scale",
        "calculate_per_token_loss: the balance loss is scaled by a rank's share of the tokens, wrong under TP and CP",
        "avoided",
        "losses are weighted so that the default scaling is the exact mean over tokens (training/step.py)",
        fixed_in="0.19.0",
        overrides=("calculate_per_token_loss",),
    ),
    Fault(
        "experts_left_out_of_gradient_norm",
        "EP > 1 and TP > 1: expert gradients count towards the norm only on tensor-parallel rank 0",
        "mended",
        "our experts are marked as split, which the norm respects (mcore/moe/experts.py)",
        fixed_in="0.19.0",
    ),
    Fault(
        "sequence_balance_loss_scale",
        "seq_aux_loss with calculate_per_token_loss: its gradient depends on the micro-batch size",
        "avoided",
        "calculate_per_token_loss is never used (training/step.py)",
        fixed_in="0.19.0",
        overrides=("calculate_per_token_loss",),
    ),
    Fault(
        "global_balance_loss_scale",
        "global_aux_loss: its gradient is the nominal one divided by the data-parallel size",
        "refused",
        "use moe_router_load_balancing_type: aux_loss",
        overrides=("moe_router_load_balancing_type",),
    ),
    Fault(
        "jitter_in_evaluation",
        "moe_input_jitter_eps: the router's input is jittered in evaluation too",
        "refused",
        "remove it",
        overrides=("moe_input_jitter_eps",),
    ),
    Fault(
        "expert_bias_moves_without_a_step",
        "moe_router_enable_expert_bias: the bias is updated with the gradients, also when the step is then not taken",
        "refused",
        "balance by moe_router_load_balancing_type: aux_loss",
        overrides=("moe_router_enable_expert_bias", "moe_router_bias_update_rate"),
    ),
    Fault(
        "fp8_silently_off",
        "fp8 without Transformer Engine: the model trains in bf16 without a word",
        "refused",
        "remove it; precision: {kind: fp8} computes in fp8, or says why it cannot",
        overrides=("fp8", "fp8_recipe", "fp8_param"),
    ),
    Fault(
        "learning_rate_of_the_checkpoint",
        "the parameter scheduler takes the peak learning rate from the checkpoint: a new one is ignored",
        "avoided",
        "the learning rate is a pure function of the step (training/schedule.py)",
    ),
    Fault(
        "router_needs_transformer_engine",
        "the router's fp32 gating names a Transformer Engine function that is unbound without it (NameError)",
        "mended",
        "our router has its own gating (mcore/moe/router.py)",
        fixed_in="0.19.0",
    ),
    Fault(
        "norm_recompute_needs_transformer_engine",
        "selective recompute of norms names a Transformer Engine class that is unbound without it (NameError)",
        "refused",
        "recompute other modules, or whole layers with recompute.granularity: full (config/training.py)",
        overrides=("recompute_modules",),
    ),
    Fault(
        "torch_adam_cannot_resume",
        "the distributed optimizer with torch's AdamW cannot load what it saved",
        "mended",
        "our Adam counts steps once, and optimizer state is saved by our own code (mcore/optimizer.py, mcore/state.py)",
    ),
    Fault(
        "norm_refuses_sequence_parallelism",
        "megatron-core's norm without Apex or Transformer Engine refuses sequence parallelism",
        "mended",
        "our RMSNorm marks its weight for the gradient sum over the TP group (mcore/norm.py)",
    ),
)


def installed_version() -> Version:
    """The installed megatron-core.

    Raises:
        EnvironmentFault: it is missing, or outside the range this framework is tested with.
    """
    try:
        version = Version(importlib.metadata.version("megatron-core"))
    except importlib.metadata.PackageNotFoundError as error:
        raise EnvironmentFault("megatron-core is not installed: pip install 'megatron-core>=0.16.1,<0.20'") from error
    if not OLDEST <= version < TOO_NEW:
        raise EnvironmentFault(
            f"megatron-core {version} is installed; this framework is tested with >= {OLDEST}, < {TOO_NEW}"
        )
    return version


def complaints_about(overrides: Mapping[str, Any]) -> list[str]:
    """One complaint for every override that would bring back a fault of the installed megatron-core."""
    version = installed_version()
    return [
        f"model.transformer_overrides.{name} = {overrides[name]!r}: {fault.what} (megatron-core {version}); {fault.how}"
        for fault in FAULTS
        if fault.present_in(version)
        for name in fault.overrides
        if name in overrides
    ]
