"""Rules between configuration keys: each names its keys, says what is wrong with their values, and the way out.

A rule is a pure function of leaf values, so the loader can apply it to the keys that are right even when others in
the same file are not, and report everything at once.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Check = Callable[..., str | list[str] | None]


@dataclass(frozen=True)
class Rule:
    """`check` takes the values of `keys`, then of `given`, and returns a complaint, several, or None.

    `keys` are named with their values in the complaint; `given` are only read. A complaint of a rule without `keys`
    names its own.
    """

    keys: tuple[str, ...]
    given: tuple[str, ...]
    check: Check

    def violations(self, values: Mapping[str, Any]) -> list[str]:
        """The complaints about `values` (leaf key to value). A rule with an unknown key says nothing."""
        if any(key not in values for key in self.keys + self.given):
            return []
        found = self.check(*(values[key] for key in self.keys + self.given))
        if not found:
            return []
        named = ", ".join(f"{key} = {as_written(values[key])!r}" for key in self.keys)
        return [f"{named}: {one}" if named else one for one in ([found] if isinstance(found, str) else found)]


def as_written(value: Any) -> Any:
    """`value` as it stands in YAML: a section as a mapping, without what is unset."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kept = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
        return {name: as_written(inner) for name, inner in kept if inner is not None}
    if isinstance(value, list):
        return [as_written(inner) for inner in value]
    if isinstance(value, Mapping):
        return {key: as_written(inner) for key, inner in value.items()}
    return value


RULES: list[Rule] = []


def rule(*keys: str, given: tuple[str, ...] = ()) -> Callable[[Check], Check]:
    """Register the decorated function as a rule over `keys`."""

    def register(check: Check) -> Check:
        RULES.append(Rule(keys, given, check))
        return check

    return register


def violations(values: Mapping[str, Any]) -> list[str]:
    """Every rule's complaint about `values`, in the order the rules are written."""
    return [complaint for r in RULES for complaint in r.violations(values)]


HEADS = "model.num_attention_heads"
GROUPS = "model.num_query_groups"
EXPERTS = "model.num_moe_experts"
SCORE = "model.moe_router_score_function"
GROUPS_OF_EXPERTS = "model.moe_router_num_groups"
BALANCE = "model.moe_router_load_balancing_type"
COEFFICIENT = "model.moe_aux_loss_coeff"
MLA = "model.multi_latent_attention"
TP = "parallel.tensor_model_parallel_size"
SP = "parallel.sequence_parallel"
CP = "parallel.context_parallel_size"
PP = "parallel.pipeline_model_parallel_size"
VPP = "parallel.virtual_pipeline_model_parallel_size"
EP = "parallel.expert_model_parallel_size"
ETP = "parallel.expert_tensor_parallel_size"
BACKEND = "runtime.backend"
KERNELS = "runtime.kernels"
COMPILE_ROUTER = "runtime.compile_router"
DEVICE = "runtime.device"
RECIPE = "precision.recipe"
BF16_AT_START = "precision.num_layers_at_start_in_bf16"
BF16_AT_END = "precision.num_layers_at_end_in_bf16"
