"""What an upcycling would do, as text: where each tensor comes from, parameters, and what is expected."""

import re
from collections.abc import Sequence

from megatron_ext.canonical.counts import count_parameters
from megatron_ext.config.help import summary_of
from megatron_ext.model_io.engine import TensorTask
from megatron_ext.upcycling.content import content_of, drawn_routers
from megatron_ext.upcycling.places import obstacle
from megatron_ext.upcycling.plan import UpcyclePlan
from megatron_ext.upcycling.sources import AVERAGE

_NUMBERED = re.compile(r"(layers|experts)\.(\d+)")


def describe_plan(plan: UpcyclePlan) -> str:
    """The origin of every tensor, parameter counts, memory and the expected exactness."""
    before, after = count_parameters(plan.checkpoints[0].model), count_parameters(plan.moe)
    content = content_of(plan, drawn_routers(plan))
    largest = max(spec.bytes for checkpoint in plan.checkpoints for spec in checkpoint.tensors.specs.values())
    written = after.total * plan.dtype.itemsize
    experts = f", of which {sum(plan.moe.moe_layer_pattern)} become MoE" if plan.adds_experts else ""
    repeated = f" ({plan.options.layers} of the source)" if plan.options.layers else ""
    taken = obstacle(plan)
    lines = [
        *([f"method       {plan.method.kind}: {summary_of(type(plan.method))}"] if plan.adds_experts else []),
        *(f"source {number}     {checkpoint.directory}" for number, checkpoint in enumerate(plan.checkpoints)),
        f"target       {plan.options.target} ({plan.options.to}, {str(plan.dtype).removeprefix('torch.')})",
        *([f"             {taken}"] if taken else []),
        f"layers       {plan.moe.num_layers}{repeated}{experts}",
        f"parameters   {before.total:,} before; {after.total:,} after, {after.active:,} active for each token",
        f"writes       {written / 1e9:,.2f} GB; needs about {1 + 4 * largest / 1e9:,.1f} GB of memory"
        + (
            f", and {4 * after.total / 1e9:,.1f} GB for the function check (--no-logits)" if plan.options.logits else ""
        ),
        f"function     {plan.expectation}",
        "tensors",
        *origins(content.tasks, several=len(plan.checkpoints) > 1),
    ]
    return "\n".join(lines)


def origins(tasks: Sequence[TensorTask], *, several: bool) -> list[str]:
    """A line for every kind of tensor, with the layers and experts that it is there for."""
    groups: dict[tuple[str, str], dict[str, set[int]]] = {}
    for task in tasks:
        for role, name in task.writes.items():
            read_from = [_origin(task.reads[role], several)] if role in task.reads else []
            origin = ": ".join([*read_from, *([task.note] if task.note else [])])
            key = (_NUMBERED.sub(r"\1.*", name), origin)
            numbers = groups.setdefault(key, {})
            for kind, number in _NUMBERED.findall(name):
                numbers.setdefault(kind, set()).add(int(number))
    return [f"  {_with_ranges(pattern, numbers)}  <-  {origin}" for (pattern, origin), numbers in groups.items()]


def _origin(name: str, several: bool) -> str:
    source, _, own = name.partition("/")
    own = _NUMBERED.sub(r"\1.*", own)
    if not several:
        return own
    return f"average of all: {own}" if source == AVERAGE else f"source {source}: {own}"


def _with_ranges(pattern: str, numbers: dict[str, set[int]]) -> str:
    for kind, present in numbers.items():
        pattern = pattern.replace(f"{kind}.*", f"{kind}.{_ranges(sorted(present))}", 1)
    return pattern


def _ranges(numbers: list[int]) -> str:
    """Sorted numbers as `{0-3,5}`."""
    parts: list[str] = []
    start = previous = numbers[0]
    for number in [*numbers[1:], None]:
        if number is not None and number == previous + 1:
            previous = number
            continue
        parts.append(str(start) if start == previous else f"{start}-{previous}")
        if number is not None:
            start = previous = number
    return "{" + ",".join(parts) + "}"
