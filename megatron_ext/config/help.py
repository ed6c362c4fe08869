"""Help texts written from the configuration itself: every key with its type, default and docstring."""

import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Any

from megatron_ext.config.base import fields_of
from megatron_ext.config.load import item_types, section_types, value_types

_WIDTH = 110


def describe_keys(cls: type, prefix: str = "") -> str:
    """All keys of a configuration, section by section."""
    return "\n".join(_section(cls, prefix))


def _section(cls: type, prefix: str) -> Iterator[str]:
    leaves = {name: info for name, info in fields_of(cls).items() if not section_types(info.annotation)}
    for name, info in leaves.items():
        default = "required" if info.is_required() else f"default {plain(info.get_default(call_default_factory=True))}"
        yield f"  {prefix}{name}  ({type_name(info.annotation)}, {default})"
        yield textwrap.fill(info.description or "", _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
        for item in item_types(info.annotation):
            yield textwrap.indent(
                f"Each entry: {summary_of(item)[0].lower()}{summary_of(item)[1:]}, with the keys", " " * 6
            )
            yield textwrap.indent(describe_keys(item, f"{prefix}{name}.N."), " " * 4)
        for item in value_types(info.annotation):
            yield textwrap.indent(
                f"For each ID: {summary_of(item)[0].lower()}{summary_of(item)[1:]}, with the keys", " " * 6
            )
            yield textwrap.indent(describe_keys(item, f"{prefix}{name}.ID."), " " * 4)
    for name, info in fields_of(cls).items():
        for variant in section_types(info.annotation):
            kind = fields_of(variant).get("kind")
            title = f"{prefix}{name}" + (f" (kind: {typing.get_args(kind.annotation)[0]})" if kind else "")
            yield f"\n{title}: {summary_of(variant)}."
            yield from _section(variant, f"{prefix}{name}.")


def summary_of(section: type) -> str:
    """The first line of its docstring, without the full stop."""
    return (section.__doc__ or "").partition("\n")[0].removesuffix(".")


def type_name(annotation: Any) -> str:
    """A type as a reader of YAML would call it."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return type_name(arguments[0])
    if hasattr(annotation, "__pydantic_fields__"):
        return "mapping"
    if origin is typing.Literal:
        return " | ".join(plain(a) for a in arguments)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(type_name(a) for a in arguments)
    if origin is list:
        return f"list of {'mappings' if section_types(arguments[0]) else type_name(arguments[0])}"
    if origin is dict:
        return "mapping"
    if annotation is type(None):
        return "null"
    names = {int: "integer", float: "number", str: "string", bool: "true | false"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def plain(value: Any) -> str:
    """A value as it is written in YAML."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value)
