"""Which fields of config.json transformers' code reads: found in its source, without importing or running it."""

import ast
import importlib.metadata
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeGuard

_BY_NAME = {"getattr", "hasattr", "setattr"}


@dataclass(frozen=True)
class Reads:
    """What the code of a model type reads of its config.json."""

    fields: frozenset[str]
    """Every field that it declares or asks for, in its own modules and in those that they import from."""
    aliases: Mapping[str, str]
    """Further names of its fields (`attribute_map`): transformers takes a value under one for a value of the other."""


def transformers_version() -> str:
    """The version of the transformers whose code is looked at."""
    return importlib.metadata.version("transformers")


@lru_cache
def reads_of(model_type: str) -> Reads | None:
    """What transformers' code of a model type reads; None if there is no such code.

    It errs on the side of too many names: what is not among them is read by nobody. It takes about a second, which
    only a config.json with fields that no table knows has to wait for.
    """
    folder = _root() / "models" / model_type
    modules = [folder / f"configuration_{model_type}.py", folder / f"modeling_{model_type}.py"]
    if not all(module.is_file() for module in modules):
        return None
    read = frozenset(name for module in _with_imports(modules) for name in _names_read(module)) - base_fields()
    own = [a_class for a_class in _classes(modules[0]) if a_class.name.endswith("Config")]
    declared = {name for a_class in own for name in _declared(a_class)}
    aliases = {alias: name for a_class in own for alias, name in _attribute_map(a_class)}
    return Reads(read | declared | aliases.keys(), aliases)


@lru_cache
def base_fields() -> frozenset[str]:
    """Fields that a configuration of any model may have, and those of text generation: they leave the logits alone."""
    names: set[str] = set()
    for base in _named_class("configuration_utils.py", "PreTrainedConfig"):
        names.update(_declared(base), (node.name for node in base.body if _is_settable(node)))
    for generation in _named_class("generation/configuration_utils.py", "GenerationConfig"):
        stored = (node for node in ast.walk(generation) if _is_of(node, "self") and isinstance(node.ctx, ast.Store))
        names.update(node.attr for node in stored)
    return frozenset(names - {"rope_scaling"})


@lru_cache
def rope_fields() -> frozenset[str]:
    """Every name that transformers' rotary embeddings may look up in `rope_parameters` or `rope_scaling`."""
    nodes = ast.walk(_parse(_root() / "modeling_rope_utils.py"))
    return frozenset(node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))


def _root() -> Path:
    spec = importlib.util.find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


@lru_cache
def _parse(module: Path) -> ast.Module:
    return ast.parse(module.read_text(encoding="utf-8"))


def _classes(module: Path) -> list[ast.ClassDef]:
    return [node for node in _parse(module).body if isinstance(node, ast.ClassDef)]


def _named_class(module: str, name: str) -> list[ast.ClassDef]:
    """The class of a module; none in a version that has it elsewhere, and then its fields count as read."""
    path = _root() / module
    return [node for node in _classes(path) if node.name.lower() == name.lower()] if path.is_file() else []


def _is_settable(node: ast.stmt) -> TypeGuard[ast.FunctionDef]:
    return isinstance(node, ast.FunctionDef) and any("setter" in ast.unparse(d) for d in node.decorator_list)


def _with_imports(modules: list[Path]) -> set[Path]:
    """The modules and those of the package that they import from: masks, caches, rotary embeddings, layers."""
    return {*modules, *(imported for module in modules for imported in _imports(module))}


def _imports(module: Path) -> Iterator[Path]:
    for node in _parse(module).body:
        if isinstance(node, ast.ImportFrom) and node.level:
            base = module.parents[node.level - 1]
            path = base.joinpath(*(node.module or "").split(".")).with_suffix(".py")
            if path.is_file():
                yield path


def _names_read(module: Path) -> Iterator[str]:
    """Names that a module reads of something called a config, and that a class of configurations reads of itself."""
    for node in ast.walk(_parse(module)):
        yield from _asked_for(node, "config")
        if isinstance(node, ast.ClassDef) and ("Config" in node.name):
            yield from _declared(node)
            for inner in ast.walk(node):
                yield from _asked_for(inner, "self")


def _asked_for(node: ast.AST, owner: str) -> Iterator[str]:
    if _is_of(node, owner):
        yield node.attr
    if not isinstance(node, ast.Call) or not node.args:
        return
    *_, name = node.args[:2]
    if not isinstance(name, ast.Constant) or not isinstance(name.value, str):
        return
    by_name = isinstance(node.func, ast.Name) and node.func.id in _BY_NAME and _is_called(node.args[0], owner)
    if by_name or (_is_of(node.func, "kwargs") and node.func.attr in ("pop", "get")):
        yield name.value


def _is_of(node: ast.AST, owner: str) -> TypeGuard[ast.Attribute]:
    return isinstance(node, ast.Attribute) and _is_called(node.value, owner)


def _is_called(node: ast.AST, owner: str) -> bool:
    """Whether an expression ends in a name with `owner` in it: `config`, `self.config`, `text_config`."""
    name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
    return owner in name.lower()


def _declared(a_class: ast.ClassDef) -> Iterator[str]:
    """Fields of a dataclass, and parameters of a constructor."""
    for node in a_class.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            if "ClassVar" not in ast.unparse(node.annotation):
                yield node.target.id
        elif isinstance(node, ast.FunctionDef) and node.name == "__init__":
            yield from (argument.arg for argument in (*node.args.args[1:], *node.args.kwonlyargs))


def _attribute_map(a_class: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for node in a_class.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == "attribute_map" for target in targets):
                for alias, name in zip(node.value.keys, node.value.values, strict=True):
                    if isinstance(alias, ast.Constant) and isinstance(name, ast.Constant):
                        yield str(alias.value), str(name.value)
