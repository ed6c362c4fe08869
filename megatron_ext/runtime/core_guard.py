"""Known faults of the installed megatron-core: which it has, and what this framework does about each.

`mended`: our code takes the place of the faulty one. `avoided`: a combination that triggers it is never built.
`refused`: a user who asks for it gets an error with the way out. Every entry has a test that shows the fault in the
versions listed here, and fails when an installed version no longer has it; or says in `needs` why a test cannot.
"""

import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from packaging.version import Version

from megatron_ext.errors import EnvironmentFault

OLDEST, TOO_NEW = Version("0.16.1"), Version("0.20")
BEST, BEST_PYTHON = Version("0.19"), Version("3.12")
"""What to use: the newest megatron-core of the range, and the first Python that gets it."""


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
    needs: str | None = None
    """What showing it takes where that is more than a CPU and megatron-core. With "Transformer Engine", tests/te shows
    it; with anything else no test here does."""

    def present_in(self, version: Version) -> bool:
        """Whether `version` of megatron-core has this fault."""
        return self.fixed_in is None or version < Version(self.fixed_in)


FAULTS: tuple[Fault, ...] = (
    Fault(
        "expert_gradients_of_wrong_group",
        "MoE with TP > 1, EP = 1 and ETP != TP: expert gradients are reduced over the wrong group, silently",
        "refused",
        "leave expert_tensor_parallel_size unset or raise expert_model_parallel_size (config/rules/parallel.py)",
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
        "set parallel.sequence_parallel: true (config/rules/parallel.py)",
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
        "experts of both backends are marked as split, which the norm respects (mcore/moe/experts.py, "
        "mcore/backends/transformer_engine.py)",
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
        "mended",
        "each rank attaches its own part of the loss, as for the other balance losses (mcore/moe/router.py)",
    ),
    Fault(
        "jitter_in_evaluation",
        "moe_input_jitter_eps: the router's input is jittered in evaluation too",
        "mended",
        "our router draws noise in training only (mcore/moe/router.py)",
    ),
    Fault(
        "expert_bias_moves_without_a_step",
        "moe_router_enable_expert_bias: the bias is updated with the gradients, also when the step is then not taken",
        "mended",
        "our router moves its bias after the optimizer's step, and not without one (training/step.py)",
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
        "mended",
        "our layer computes them again by itself (mcore/norms_again.py)",
        overrides=("recompute_modules",),
    ),
    Fault(
        "recomputed_bias_never_ends",
        "selective recompute of an MLP with biases takes the bias for the module's own result: backward never ends",
        "mended",
        "our MLP adds its output bias itself (mcore/feed_forward.py)",
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
        "our norms mark their weights for the gradient sum over the TP group (mcore/norm.py)",
    ),
    Fault(
        "sums_of_strided_tensors",
        "sums over the TP group, forward and backward, leave a tensor that is not contiguous unsummed, silently",
        "mended",
        "our sums copy it first (mcore/group_sums.py)",
        fixed_in="0.19.0",
    ),
    Fault(
        "latent_attention_needs_transformer_engine",
        "multi-latent attention with norms cannot be built without Transformer Engine (TypeError or RuntimeError)",
        "mended",
        "our attention builds the parts itself (mcore/mla.py)",
    ),
    Fault(
        "latent_key_gradient_of_one_rank",
        "multi-latent attention without Transformer Engine: each TP rank keeps its part of the shared key's gradient",
        "mended",
        "our down-projections are whole on every rank (mcore/mla.py)",
    ),
    Fault(
        "shared_experts_refuse_biases",
        "shared experts refuse biases in linear layers",
        "mended",
        "ours have them (mcore/moe/shared_experts.py)",
    ),
    Fault(
        "experts_refuse_biases_under_etp",
        "experts with biases refuse expert tensor parallelism, where each rank would add the output bias",
        "mended",
        "ours split the output bias over the ranks (mcore/moe/experts.py)",
    ),
    Fault(
        "attention_refuses_context_parallelism",
        "megatron-core's attention without Transformer Engine refuses context parallelism",
        "mended",
        "our core attention gathers keys and values over the context-parallel group (mcore/attention.py)",
    ),
    Fault(
        "upcycling_leaves_shared_experts_random",
        "upcycling_utils makes routed experts only: shared experts keep the values that they were initialised with",
        "avoided",
        "every upcycling method is our own and makes shared experts too (upcycling/)",
    ),
    Fault(
        "upcycling_needs_every_layer_moe",
        "upcycling_utils fails on models whose first layers stay dense",
        "avoided",
        "our methods work one layer at a time, whatever the pattern of layers (upcycling/layers.py)",
    ),
    Fault(
        "upcycling_swaps_models_of_several_chunks",
        "upcycling_utils swaps the dense and the MoE model with virtual pipeline stages",
        "avoided",
        "upcycling reads and writes whole tensors, without any layout (upcycling/, checkpoint/streams.py)",
    ),
    Fault(
        "upcycling_option_cannot_run",
        "moe-use-upcycling: the wheel of 0.16 has no training script, that of 0.19 calls its loader by a wrong name",
        "avoided",
        "training and upcycling are our own (training/, upcycling/)",
    ),
    Fault(
        "converters_drop_experts",
        "tools/checkpoint writes stacked keys that the model does not read, and so loses all experts",
        "avoided",
        "conversion is our own, and accounts for every tensor (model_io/)",
        needs="the scripts of megatron-core's repository, which are not in its wheel",
    ),
    Fault(
        "default_optimizer_format_cannot_be_saved",
        "without a distrib_optim_sharding_type the distributed optimizer's state cannot be saved at all",
        "avoided",
        "optimizer state is saved by our own code (mcore/state.py)",
    ),
    Fault(
        "reshardable_optimizer_format_is_bound_to_a_layout",
        "the format dp_reshardable saves the buckets of one layout: only the data-parallel size may change",
        "avoided",
        "optimizer state is saved a parameter at a time, under the model's own names (mcore/state.py)",
    ),
    Fault(
        "optimizer_parts_follow_expert_parallelism",
        "the number of chained optimizers depends on EP: a checkpoint does not load after a change between 1 and more",
        "mended",
        "experts are expert parameters in every layout, and state goes by parameter names (mcore/moe/experts.py)",
    ),
    Fault(
        "lasting_saver_needs_a_gpu",
        "asynchronous saving by a process that stays divides by the number of GPUs: on CPU it dies and the run hangs",
        "avoided",
        "checkpoints are written by our own code (checkpoint/save.py)",
    ),
    Fault(
        "sample_order_depends_on_length",
        "the order of samples depends on how many are asked for: a longer run reads others on the way",
        "avoided",
        "each epoch is shuffled by itself (data/stream/sources.py)",
    ),
    Fault(
        "padding_mask_means_its_opposite",
        "padding_mask: the routers' docstrings say that True marks valid tokens; it marks padding",
        "avoided",
        "samples are full and no padding mask is passed; labels that do not count are in the loss mask",
    ),
    Fault(
        "loss_of_two_is_multiplied_by_context_ranks",
        "a loss function that returns two values has its loss multiplied by the context-parallel size",
        "avoided",
        "losses are weighted with that in mind (training/step.py)",
    ),
    Fault(
        "attention_mask_ignored_by_transformer_engine",
        "Transformer Engine's attention ignores the mask of documents: they leak into each other",
        "refused",
        "use runtime.backend: torch with data.reset_attention_mask (config/rules/training.py)",
        fixed_in="0.19.0",
        needs="Transformer Engine's kernels on a GPU",
    ),
    Fault(
        "weight_gradients_in_fp8_whatever_is_asked",
        "fp8_wgrad = False: handed to Transformer Engine with delayed scaling alone, whose later versions ignore it",
        "refused",
        "leave fp8_wgrad, or use runtime.backend: torch (config/rules/backend.py)",
        needs="Transformer Engine",
    ),
    Fault(
        "delayed_scaling_of_experts_is_lost",
        "the delayed scaling of grouped experts is not cut by expert: 0.16 mixes experts, 0.19 fails to save",
        "mended",
        "each expert's scales and amax history are saved as plain tensors (mcore/backends/transformer_engine.py)",
        needs="Transformer Engine",
    ),
    Fault(
        "transformer_engine_chosen_without_a_gpu",
        "where Transformer Engine can be imported its CUDA-only optimizer is taken, also without a GPU",
        "mended",
        "it is hidden from megatron-core where there is no GPU (runtime/cpu_compat.py)",
        needs="Transformer Engine",
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


def versions(python: str | None = None, core: Version | None = None) -> str:
    """Python and megatron-core in one line, and which ones to use instead, if others.

    Args:
        python: version of Python; None takes this one.
        core: version of megatron-core; None takes the installed one.
    """
    python = python or platform.python_version()
    try:
        core = core or installed_version()
    except EnvironmentFault as fault:
        return f"Python {python}; {fault}"
    here = f"Python {python} with megatron-core {core}"
    if core >= BEST:
        return here
    if Version(python) >= BEST_PYTHON:
        return f"{here}; {BEST} is the one to use: pip install 'megatron-core>={BEST},<{TOO_NEW}'"
    return f"{here}: supported, with more faults; Python {BEST_PYTHON} with megatron-core {BEST} is the one to use"


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
