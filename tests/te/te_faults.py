"""Shows the faults of megatron-core that need Transformer Engine, but no GPU: see tests/distributed/core_faults.py."""

import pickle
from collections.abc import Callable
from unittest import mock

import torch

from megatron_ext.config import Fp8Precision, ParallelConfig, RecomputeConfig, RuntimeConfig
from megatron_ext.runtime.process_groups import split_process_group
from megatron_ext.runtime.seeds import seed_everything
from megatron_ext.testing.pool import GlooPool
from megatron_ext.testing.tiny import tiny_model
from megatron_ext.testing.transformer_engine import as_on_hopper, build_with_transformer_engine

MOE = tiny_model(moe=True)
DELAYED = Fp8Precision(kind="fp8", recipe="delayed", amax_history_len=4)


def wgrad_makes_no_difference() -> bool:
    """Whether each recipe that Transformer Engine gets is the same, whatever megatron-core's fp8_wgrad says."""
    from megatron.core.fp8_utils import get_fp8_recipe

    split_process_group(ParallelConfig(), RuntimeConfig(device="cpu"))
    seed_everything(0)
    for recipe in ("delayed", "tensorwise", "blockwise", "mxfp8"):
        precision = Fp8Precision(kind="fp8", recipe=recipe)
        config, _ = build_with_transformer_engine(MOE, ParallelConfig(), precision, RecomputeConfig())
        asked = []
        for config.fp8_wgrad in (True, False):
            asked.append(vars(get_fp8_recipe(config)))
        if asked[0] != asked[1]:
            return False
    return True


def weight_gradients_in_fp8_whatever_is_asked(pool: GlooPool) -> bool:
    return pool.run(1, wgrad_makes_no_difference)[0]


def experts_lose_scaling() -> bool:
    """Whether megatron-core's own grouped layer cannot be described for saving, or gives experts others' columns."""
    from megatron.core.extensions.transformer_engine import TEColumnParallelGroupedLinear
    from megatron.core.fp8_utils import get_fp8_context

    split_process_group(ParallelConfig(), RuntimeConfig(device="cpu"))
    seed_everything(0)
    config, _ = build_with_transformer_engine(MOE, ParallelConfig(), DELAYED, RecomputeConfig())
    with as_on_hopper(), mock.patch.object(torch.cuda, "synchronize"):
        experts = TEColumnParallelGroupedLinear(
            4, 64, 32, config=config, init_method=torch.nn.init.zeros_, bias=False, skip_bias_add=True, is_expert=True
        )
        with get_fp8_context(config):
            experts.init_fp8_metadata(num_gemms=4)
        scale = experts.fp8_meta["scaling_fwd"].scale
        scale.copy_(torch.arange(12.0))
        try:
            parts = experts._split_extra_state(experts.get_extra_state())
        except pickle.UnpicklingError:
            return True
        first = pickle.loads(parts[0].numpy().tobytes())["scale_fwd"]
    return not torch.equal(first, scale[:3])


def delayed_scaling_of_experts_is_lost(pool: GlooPool) -> bool:
    return pool.run(1, experts_lose_scaling)[0]


def optimizer_is_transformer_engines() -> bool:
    from megatron.core import optimizer

    return not torch.cuda.is_available() and optimizer.Adam.__module__.startswith("transformer_engine")


def transformer_engine_chosen_without_a_gpu(pool: GlooPool) -> bool:
    return pool.run(1, optimizer_is_transformer_engines)[0]


SHOWN: dict[str, Callable[[GlooPool], bool]] = {
    function.__name__: function
    for function in (
        weight_gradients_in_fp8_whatever_is_asked,
        delayed_scaling_of_experts_is_lost,
        transformer_engine_chosen_without_a_gpu,
    )
}
