"""megatron-core's optimizers with our Adam inside, and the step taken apart so that a bad one can be refused."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_ext.config import AdamConfig, ParallelConfig, Precision
from megatron_ext.mcore.model import splits_optimizer
from megatron_ext.mcore.transformer_config import DTYPES
from megatron_ext.runtime import cpu_compat


class FusedAdam:
    """AdamW by torch's fused kernel, counting its steps once instead of once a parameter.

    This is the contract of Apex's and Transformer Engine's FusedAdam, which megatron-core expects: state holds
    `exp_avg` and `exp_avg_sq` only, and exists before the first step so that a checkpoint can be loaded into it.
    With torch.optim.AdamW megatron-core's distributed optimizer can save but not load. No torch.optim.Optimizer,
    because that refuses the distributed optimizer's fp32 shards, which are views of the weights.

    Moments may be kept in bf16, or in the host's memory. A step then takes them in fp32, on the device, a block at a
    time, computes as ever, and puts them back. megatron-core's own options for either want other optimizers.
    """

    def __init__(self, param_groups: Iterable[dict[str, Any]], adam: AdamConfig) -> None:
        self.param_groups = list(param_groups)
        self.betas, self.eps = (adam.adam_beta1, adam.adam_beta2), adam.adam_eps
        self.steps = 0
        self.lr_multipliers: dict[torch.Tensor, float] = {}
        """Of parameters that learn with another rate than their group's: by what that is multiplied."""
        dtypes = {"exp_avg": _MOMENT_DTYPES[adam.exp_avg_dtype], "exp_avg_sq": _MOMENT_DTYPES[adam.exp_avg_sq_dtype]}
        self.state = {
            param: {name: _zeros(param, dtype, on_host=adam.moments_on_host) for name, dtype in dtypes.items()}
            for group in self.param_groups
            for param in group["params"]
        }
        self._in_place = not adam.moments_on_host and adam.exp_avg_dtype == adam.exp_avg_sq_dtype == "fp32"

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        self.steps += 1
        for group in self.param_groups:
            by_rate: dict[float, list[torch.Tensor]] = {}
            for param in group["params"]:
                if param.grad is not None:
                    by_rate.setdefault(self.lr_multipliers.get(param, 1.0), []).append(param)
            for multiplier, params in by_rate.items():
                self._update(params, group["lr"] * multiplier, group["weight_decay"])

    def _update(self, params: list[torch.Tensor], lr: float, weight_decay: float) -> None:
        states = [(p, p.grad, self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"]) for p in params]
        for block in [states] if self._in_place else _blocks(states):
            weights, grads, firsts, seconds = (list(kind) for kind in zip(*block, strict=True))
            used_firsts, used_seconds = _as_computed(firsts, weights), _as_computed(seconds, weights)
            torch._fused_adamw_(
                weights,
                grads,
                used_firsts,
                used_seconds,
                [],
                # Filled on the device; a copy from the host would wait for it.
                [torch.full((), float(self.steps), device=weights[0].device)] * len(weights),
                lr=lr,
                beta1=self.betas[0],
                beta2=self.betas[1],
                weight_decay=weight_decay,
                eps=self.eps,
                amsgrad=False,
                maximize=False,
            )
            _put_back(firsts + seconds, used_firsts + used_seconds)


_MOMENT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_BLOCK = 2**26
"""Numbers of each moment that a step has in fp32 beside where they are kept (planning/peak_memory.py counts them)."""


def _zeros(param: torch.Tensor, dtype: torch.dtype, *, on_host: bool) -> torch.Tensor:
    """A moment of `param` before the first step."""
    if on_host and param.is_cuda:
        return torch.zeros(param.shape, dtype=dtype, pin_memory=True)
    return torch.zeros_like(param, dtype=dtype)


def _as_computed(kept: list[torch.Tensor], weights: list[torch.Tensor]) -> list[torch.Tensor]:
    """Moments in the dtype and on the device of their weights: themselves where they are so."""
    return [moment.to(weight, non_blocking=True) for moment, weight in zip(kept, weights, strict=True)]


def _put_back(kept: list[torch.Tensor], computed: list[torch.Tensor]) -> None:
    for moment, new in zip(kept, computed, strict=True):
        if moment is not new:
            moment.copy_(new)


def _blocks(states: Sequence[tuple[Any, ...]]) -> Iterator[list[list[torch.Tensor]]]:
    """The tensors of `states`, each a tuple of one size, flat and cut into blocks of at most so many numbers."""
    block, room = list[list[torch.Tensor]](), _BLOCK
    for tensors in states:
        flat, start, size = [tensor.view(-1) for tensor in tensors], 0, tensors[0].numel()
        while start < size:
            end = min(start + room, size)
            block.append([tensor[start:end] for tensor in flat])
            room -= end - start
            start = end
            if room == 0:
                yield block
                block, room = [], _BLOCK
    if block:
        yield block


def build_optimizer(
    adam: AdamConfig, parallel: ParallelConfig, precision: Precision, chunks: list[torch.nn.Module]
) -> ChainedOptimizer:
    """Return the optimizer of the wrapped model `chunks`: one part for dense parameters, one for experts."""
    settings = OptimizerConfig(
        optimizer="adam",
        lr=adam.lr,
        weight_decay=adam.weight_decay,
        adam_beta1=adam.adam_beta1,
        adam_beta2=adam.adam_beta2,
        adam_eps=adam.adam_eps,
        clip_grad=adam.clip_grad,
        bf16=DTYPES[precision.kind] is torch.bfloat16,
        params_dtype=DTYPES[precision.kind],
        use_distributed_optimizer=splits_optimizer(parallel),
        overlap_param_gather=bool(parallel.overlap_param_gather),
    )
    with cpu_compat.cuda_type_names():
        optimizer = get_megatron_optimizer(settings, chunks, use_gloo_process_groups=False)
    for part in optimizer.chained_optimizers:
        if not getattr(part, "is_stub_optimizer", False):
            groups = [_with_decay(group, adam) for group in part.optimizer.param_groups]
            part.optimizer = FusedAdam(groups, adam)
    return optimizer


def _with_decay(group: dict[str, Any], adam: AdamConfig) -> dict[str, Any]:
    """A parameter group with megatron-core's decay multiplier (0 for norms and biases) applied."""
    return {**group, "lr": adam.lr, "weight_decay": adam.weight_decay * group["wd_mult"]}


def set_learning_rate(optimizer: ChainedOptimizer, lr: float) -> None:
    """Use `lr` from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def multiply_learning_rates(optimizer: ChainedOptimizer, attribute: str, ratio: float) -> None:
    """Let the model's parameters that have `attribute` learn with `ratio` times the learning rate."""
    for part in _parts(optimizer) if ratio != 1.0 else ():
        multipliers = part.optimizer.lr_multipliers
        multipliers |= {main: ratio for param, _, main in main_parameters(part) if hasattr(param, attribute)}


def main_parameters(part: Any) -> Iterator[tuple[torch.Tensor, int, torch.Tensor]]:
    """Of one part of the optimizer: (model parameter, where this rank's shard of it starts, what Adam updates)."""
    if getattr(part, "is_stub_optimizer", False):
        return
    inner = part.optimizer
    if isinstance(part, DistributedOptimizer):
        for param, (group, position) in part.model_param_group_index_map.items():
            start = part._get_model_param_range_map(param)["param"].start
            yield param, start, inner.param_groups[group]["params"][position]
        return
    if hasattr(part, "float16_groups"):
        pairs = zip(part.float16_groups, part.fp32_from_float16_groups, strict=True)
        for params, mains in pairs:
            for param, main in zip(params, mains, strict=True):
                yield param, 0, main
        same = [param for group in part.fp32_from_fp32_groups for param in group]
    else:
        same = [param for group in inner.param_groups for param in group["params"]]
    for param in same:
        yield param, 0, param


def optimizer_steps(optimizer: ChainedOptimizer) -> int:
    """Steps taken; Adam's bias correction depends on it."""
    return max((part.optimizer.steps for part in _parts(optimizer)), default=0)


def set_optimizer_steps(optimizer: ChainedOptimizer, steps: int) -> None:
    """Continue counting from `steps`."""
    for part in _parts(optimizer):
        part.optimizer.steps = steps


def gradient_norm(optimizer: ChainedOptimizer) -> float:
    """Bring the reduced gradients to the optimizer and return their global L2 norm. Every rank must call this.

    The host waits for the device once: megatron-core's own norm waits once a parameter where neither Transformer Engine
    nor Apex is installed.
    """
    optimizer.prepare_grads()
    # Of dense parameters and of experts; they may be reduced over different groups. Also those without parameters here
    # take part in the reduction.
    grads_of_group: dict[Any, list[torch.Tensor]] = {}
    for part in optimizer.chained_optimizers:
        # megatron-core 0.19 has another name for it.
        grads_of = getattr(part, "get_grads_for_grad_norm", None) or part.get_main_grads_for_grad_norm
        grads_of_group.setdefault(part.get_grad_stats_parallel_group(), []).extend(grads_of())
    squares = [_sum_of_squares(grads, group) for group, grads in grads_of_group.items()]
    return math.sqrt(float(torch.stack(squares).sum()))


def _sum_of_squares(grads: list[torch.Tensor], group: dist.ProcessGroup) -> torch.Tensor:
    """Squared L2 norm of all `grads` of the ranks of `group`: a scalar on the device, in fp32."""
    if grads:
        square = torch.stack(torch._foreach_norm(grads)).norm().square()
    else:
        square = torch.zeros((), device=_device_of(group))
    dist.all_reduce(square, group=group)
    return square


def _device_of(group: dist.ProcessGroup) -> torch.device:
    """Where the tensors live that `group` reduces."""
    return (
        torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else torch.device("cpu")
    )


@torch.no_grad()
def clip_and_step(optimizer: ChainedOptimizer, norm: float, max_norm: float) -> None:
    """Scale the gradients down to `max_norm` where `norm` exceeds it (0: never), and update the weights."""
    factor = max_norm / (norm + 1e-6) if max_norm > 0 else 1.0
    if factor < 1.0:
        grads = [p.grad for part in _parts(optimizer) for p in part.get_parameters() if p.grad is not None]
        if grads:
            torch._foreach_mul_(grads, factor)
    optimizer.step_with_ready_grads()


def _parts(optimizer: ChainedOptimizer) -> list[Any]:
    return [part for part in optimizer.chained_optimizers if not getattr(part, "is_stub_optimizer", False)]
