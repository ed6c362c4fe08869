"""Puts other classes in the place of parts of a layer, by a pure rewrite of the tree of specs."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

AdapterPlan = Mapping[str, Callable[[type], type]]
"""Of each part to change, what to build in place of its class. Parts are named as modules are within a layer:
`self_attention.linear_qkv`, `mlp.linear_fc1`, `mlp.experts`, `mlp.shared_experts.linear_fc2`; those of one layer
alone as within the decoder: `layers.3.mlp.experts`, counted from 0 over the whole model."""


NO_ADAPTERS: AdapterPlan = {}


def with_adapters(spec: Any, plan: AdapterPlan, first_layer: int = 0) -> Any:
    """Return the spec of a layer or of a block of layers with the parts of `plan` changed; `spec` stays as it is.

    A part that some layers do not have (dense layers have no `mlp.experts`) is changed where it is; a part of only
    Transformer Engine's or only the torch backend's layers likewise.

    Args:
        first_layer: the number of the block's first layer in the model.

    Raises:
        KeyError: no layer has a part of that name.
    """
    if not plan:
        return spec
    met: set[str] = set()
    if not hasattr(spec, "layer_specs"):
        changed, here = _rewrite(spec, "", plan, met), set(plan)
    else:
        plans = [_of_layer(plan, first_layer + number) for number in range(len(spec.layer_specs))]
        here = {part for one in plans for part in one.values()}
        changed = _with_layers(spec, plans, plan, met)
    if missing := sorted(here - met):
        raise KeyError(f"no layer has a part {', '.join(missing)}")
    return changed


def _of_layer(plan: AdapterPlan, layer: int) -> dict[str, str]:
    """The parts of one layer that `plan` changes, and its name for each; what is of this layer alone comes first."""
    own = f"layers.{layer}."
    parts = {name: name for name in plan if not name.startswith("layers.")}
    return parts | {name.removeprefix(own): name for name in plan if name.startswith(own)}


def _with_layers(block: Any, plans: list[dict[str, str]], plan: AdapterPlan, met: set[str]) -> Any:
    """The spec of a block with each of its layers changed by its own plan."""
    made: dict[Any, Any] = {}
    layers = []
    for spec, names in zip(block.layer_specs, plans, strict=True):
        own = {part: plan[name] for part, name in names.items()}
        # Layers of one kind share one spec; those changed in the same way share the changed one too.
        key = id(spec), tuple(own.items())
        met_here: set[str] = set()
        if key not in made:
            made[key] = _rewrite(spec, "", own, met_here), met_here
        changed, met_here = made[key]
        met.update(names[part] for part in met_here)
        layers.append(changed)
    return replace(block, layer_specs=layers)


def _rewrite(node: Any, name: str, plan: AdapterPlan, met: set[str]) -> Any:
    """`node` is the part called `name`: a class, a spec or a partial call of one, or its parts."""
    if isinstance(node, type):
        if name not in plan:
            return node
        met.add(name)
        return plan[name](node)
    if isinstance(node, functools.partial):
        # megatron-core 0.19: the class, or its method that builds it, to be called with its parts.
        inner = node.keywords.get("submodules")
        parts = {} if inner is None else {"submodules": _rewrite(inner, name, plan, met)}
        return functools.partial(_rewrite(node.func, name, plan, met), *node.args, **{**node.keywords, **parts})
    if not is_dataclass(node) or isinstance(node, type):
        return node
    values = {field.name: getattr(node, field.name) for field in fields(node) if field.init}
    return replace(node, **{key: _rewrite(value, _name(name, key), plan, met) for key, value in values.items()})


def _name(parent: str, field: str) -> str:
    """The name of a field's part; a spec's own fields belong to the part itself."""
    if field in ("module", "submodules"):
        return parent
    return f"{parent}.{field}" if parent else field
