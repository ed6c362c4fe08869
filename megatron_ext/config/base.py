"""What every configuration section is: a frozen, strict pydantic dataclass whose docstrings are the help."""

from collections.abc import Callable
from dataclasses import dataclass as plain_dataclass
from typing import Annotated, Any, TypeVar, dataclass_transform

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

T = TypeVar("T")


@plain_dataclass(frozen=True)
class IsPath:
    """Marks a text that is the path of a file or directory: messages then give it absolute."""


PathName = Annotated[str, IsPath()]
"""A path as people write it, kept so in what is written."""

_SETTINGS = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(Field,))
def config(cls: type[T]) -> type[T]:
    """Make `cls` a configuration section.

    The docstring under each attribute becomes its `--help` text. Values are never coerced between types: a
    string where a number belongs is an error that names the key.
    """
    make: Callable[[type[T]], Any] = dataclass(frozen=True, kw_only=True, config=_SETTINGS)
    made: type[T] = make(cls)
    return made
