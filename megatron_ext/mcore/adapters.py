"""Puts other classes in the place of parts of a layer, by a pure rewrite of the tree of specs."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

AdapterPlan = Mapping[str, Callable[[type], type]]
"""Of each part to change, what to build in place of its class. Parts are named as modules are within a layer:
`self_attention.linear_qkv`, `mlp.linear_fc1`, `mlp.experts`, `mlp.shared_experts.linear_fc2`."""


NO_ADAPTERS: AdapterPlan = {}


def with_adapters(spec: Any, plan: AdapterPlan) -> Any:
    """Return the spec of a layer or of a block of layers with the parts of `plan` changed; `spec` stays as it is.

    A part that some layers do not have (dense layers have no `mlp.experts`) is changed where it is; a part of only
    Transformer Engine's or only the torch backend's layers likewise.

    Raises:
        KeyError: no layer has a part of that name.
    """
    if not plan:
        return spec
    met: set[str] = set()
    changed = _rewrite(spec, "", plan, met)
    if missing := sorted(set(plan) - met):
        raise KeyError(f"no layer has a part {', '.join(missing)}")
    return changed


def _rewrite(node: Any, name: str, plan: AdapterPlan, met: set[str]) -> Any:
    """`node` is the part called `name`: a class, a spec or a partial call of one, its parts, or a list of layers."""
    if isinstance(node, type):
        if name not in plan:
            return node
        met.add(name)
        return plan[name](node)
    if isinstance(node, list):
        # Layers of one kind share one spec; they share the changed one too.
        made = {id(item): _rewrite(item, name, plan, met) for item in node}
        return [made[id(item)] for item in node]
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
    if field in ("module", "submodules", "layer_specs"):
        return parent
    return f"{parent}.{field}" if parent else field
