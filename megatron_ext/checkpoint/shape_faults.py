"""Which tensors are missing, unexpected or misshapen: one report, whoever compares them."""

from collections.abc import Mapping, Sequence

from megatron_ext.checkpoint.shards import Shape

_SHOWN = 30


def shape_faults(present: Mapping[str, Shape], expected: Mapping[str, Shape], says: str) -> list[str]:
    """A line for each tensor that is missing or misshapen.

    Args:
        says: whose the expected shape is, as in "the configuration says".
    """
    missing = [f"missing: {name} {list(shape)}" for name, shape in expected.items() if name not in present]
    misshapen = [
        f"misshapen: {name} is {list(present[name])}, {says} {list(shape)}"
        for name, shape in expected.items()
        if name in present and present[name] != shape
    ]
    return missing + misshapen


def unexpected_tensors(present: Mapping[str, Shape], expected: Mapping[str, Shape]) -> list[str]:
    """A line for each tensor that should not be there."""
    return [f"unexpected: {name} {list(shape)}" for name, shape in present.items() if name not in expected]


def shown(faults: Sequence[str]) -> str:
    """The first of `faults`, indented, and how many more there are."""
    lines = [f"  {fault}" for fault in faults[:_SHOWN]]
    more = [f"  and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else []
    return "\n".join(lines + more)
