"""What every configuration section is: a frozen, strict pydantic dataclass whose docstrings are the help."""

import os
from collections.abc import Callable
from dataclasses import dataclass as plain_dataclass
from typing import Annotated, Any, TypeVar, dataclass_transform

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from megatron_ext.config.effect import shapes_function, shapes_weights, training_only

T = TypeVar("T")


@plain_dataclass(frozen=True)
class IsPath:
    """Marks a text that is the path of a file or directory: messages then give it absolute."""


def _nameable(path: str) -> str:
    try:
        name = os.fsencode(path)
    except UnicodeEncodeError:
        name = b"\0"
    if b"\0" in name:
        raise ValueError("must be a path; a NUL and half a character are in none")
    return path


PathName = Annotated[str, AfterValidator(_nameable), IsPath()]
"""A path as people write it, kept so in what is written."""


def _whole(value: Any) -> Any:
    """2e9 as the integer that it is; anything else as it was."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Count = Annotated[int, BeforeValidator(_whole)]
"""A large number of tokens or samples, which may be written 2e9."""

_SETTINGS = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


@dataclass_transform(
    kw_only_default=True, frozen_default=True, field_specifiers=(Field, shapes_weights, shapes_function, training_only)
)
def config(cls: type[T]) -> type[T]:
    """Make `cls` a configuration section.

    The docstring under each attribute becomes its `--help` text. Values are never coerced between types: a
    string where a number belongs is an error that names the key.
    """
    make: Callable[[type[T]], Any] = dataclass(frozen=True, kw_only=True, config=_SETTINGS)
    made: type[T] = make(cls)
    # pydantic reads the docstrings of a class's own fields; those it inherits have theirs in the base.
    for base in made.__mro__[1:]:
        for name, info in getattr(base, "__pydantic_fields__", {}).items():
            field = fields_of(made)[name]
            field.description = field.description or info.description
    return made


def fields_of(cls: type) -> dict[str, Any]:
    """Pydantic's description of each field of a configuration section."""
    return cls.__pydantic_fields__  # type: ignore[attr-defined, no-any-return]
