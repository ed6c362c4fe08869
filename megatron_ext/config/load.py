"""From YAML and `section.key=value` to a configuration, with every fault in one message."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from megatron_ext.config.base import IsPath, fields_of
from megatron_ext.config.model import ModelConfig
from megatron_ext.config.root import DERIVED, RunConfig
from megatron_ext.config.rules import stage_violations, violations
from megatron_ext.config.yaml_text import parse_scalar, read_yaml
from megatron_ext.errors import ConfigError, note_path

T = TypeVar("T")

_PLAIN = {
    "int_type": "must be an integer",
    "int_from_float": "must be an integer",
    "float_type": "must be a number",
    "string_type": "must be a string",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be a mapping",
    "too_short": "must not be empty",
    "string_too_short": "must not be empty",
}


@dataclasses.dataclass(frozen=True)
class RunText:
    """What a run's file says, as far as it is right: others can then look for faults of their own kind."""

    source: str
    run: RunConfig | None
    """The run, if nothing is wrong with it."""
    values: Mapping[str, Any]
    """Every valid value and section by its name, such as `train.seed` and `train`."""
    faults: Sequence[str]


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the run configuration at `path` with `section.key=value` overrides applied.

    Raises:
        ConfigError: listing every unknown key, wrong type, wrong choice and violated rule.
    """
    return load_config(RunConfig, read_yaml(path), overrides, source=str(path))


def read_run_text(path: str | Path, overrides: Sequence[str] = ()) -> RunText:
    """`load_run` that returns the faults beside all that is right.

    Raises:
        ConfigError: the file cannot be read, or is no mapping.
    """
    reader, run = _read(RunConfig, read_yaml(path), overrides, source=str(path))
    return RunText(str(path), None if reader.faults else run, reader.values, reader.faults)


def values_of(run: RunConfig, sections: Sequence[str] | None = None) -> Mapping[str, Any]:
    """Every value and section of `run` by its name, as in `RunText`; of some `sections`, if they are given."""
    reader = _Reader(RunConfig)
    for section in sections or fields_of(RunConfig):
        reader.keep(section, getattr(run, section))
    return reader.values


def raise_faults(source: str, faults: Sequence[str]) -> None:
    """Raise ConfigError with all `faults`, if there are any."""
    if faults := list(dict.fromkeys(faults)):  # a file that several looks meet has one fault
        count = "1 problem" if len(faults) == 1 else f"{len(faults)} problems"
        raise ConfigError(f"{source}: {count}\n" + "\n".join(f"  {fault}" for fault in faults))


def load_config(cls: type[T], raw: Any, overrides: Sequence[str] = (), *, source: str) -> T:
    """Validate the mapping `raw`, with overrides applied, as a `cls`. `source` names where it came from in errors.

    A model alone is held to the rules between its own keys, as within a run.
    """
    reader, result = _read(cls, raw, overrides, source=source)
    raise_faults(source, reader.faults)
    return result


def _read(cls: type[T], raw: Any, overrides: Sequence[str], *, source: str) -> "tuple[_Reader, T]":
    """The reader of `raw`, with all faults in it, and what it made."""
    if not isinstance(raw, dict):
        raise ConfigError(f"{source}: expected a mapping of keys, found {type(raw).__name__}")
    prefix = "model." if cls is ModelConfig else ""
    reader = _Reader(cls, prefix)
    for override in overrides:
        reader.override(raw, override)
    result: T = reader.section(cls, raw, prefix)
    if cls in (RunConfig, ModelConfig):
        reader.faults += violations(reader.values) + stage_violations(reader.values)
    return reader, result


def check_model(model: ModelConfig, *, source: str) -> None:
    """Raise ConfigError where the values of `model` do not go together."""
    load_config(ModelConfig, to_mapping(model), source=source)


def to_mapping(configuration: Any) -> dict[str, Any]:
    """The configuration as nested plain mappings, ready for YAML, that `load_config` turns into an equal one."""
    return dataclasses.asdict(configuration)


def section_types(annotation: Any) -> list[type]:
    """The configuration sections an annotation admits: none for a leaf, several for a tagged union."""
    if typing.get_origin(annotation) is typing.Annotated:
        return section_types(typing.get_args(annotation)[0])
    if _is_union(annotation):
        return [section for member in typing.get_args(annotation) for section in section_types(member)]
    return [annotation] if hasattr(annotation, "__pydantic_fields__") else []


def item_types(annotation: Any) -> list[type]:
    """The configuration sections that the items of a list may be; none where it is no list of sections."""
    return section_types(typing.get_args(annotation)[0]) if typing.get_origin(annotation) is list else []


def kind_of(cls: type) -> str:
    """What the field `kind` of a member of a tagged union is."""
    return str(typing.get_args(fields_of(cls)["kind"].annotation)[0])


def value_types(annotation: Any) -> list[type]:
    """The configuration sections that the values of a mapping may be; none where it is no mapping to sections."""
    return section_types(typing.get_args(annotation)[1]) if typing.get_origin(annotation) is dict else []


def paths_of(configuration: Any, prefix: str = "") -> dict[str, str]:
    """Every path that a configuration names, by its key."""
    if isinstance(configuration, list | dict):
        items = configuration.items() if isinstance(configuration, dict) else enumerate(configuration)
        return {key: path for name, item in items for key, path in paths_of(item, f"{prefix}{name}.").items()}
    found = dict[str, str]()
    for name, info in getattr(type(configuration), "__pydantic_fields__", {}).items():
        value = getattr(configuration, name)
        if value is not None and _is_path(typing.Annotated[(info.annotation, *info.metadata, None)]):
            paths = value if isinstance(value, list) else [value]
            found |= {f"{prefix}{name}": path for path in paths if isinstance(path, str)}
        else:
            found |= paths_of(value, f"{prefix}{name}.")
    return found


def _is_path(annotation: Any) -> bool:
    """Whether a leaf is a path, or a list of them."""
    arguments = typing.get_args(annotation)
    return any(isinstance(argument, IsPath) for argument in arguments) or any(map(_is_path, arguments))


def _is_union(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


class _Reader:
    """Reads sections key by key, so that one fault hides no other, and keeps the values that are right."""

    def __init__(self, root: type, prefix: str = "") -> None:
        self._root, self._prefix = root, prefix
        self.faults: list[str] = []
        self.values: dict[str, Any] = {}

    def override(self, raw: dict[str, Any], override: str) -> None:
        """Set one `section.key=value` in `raw`."""
        key, equals, text = override.partition("=")
        if not equals or not key:
            self.faults.append(f"{override}: expected section.key=value")
            return
        *sections, leaf = key.split(".")
        node: Any = raw
        for section in sections:
            if isinstance(node, dict):
                if node.get(section) is None:
                    node[section] = {}
                node = node[section]
            elif isinstance(node, list) and section.isdigit() and int(section) < len(node):
                node = node[int(section)]
        if isinstance(node, dict):
            node[leaf] = parse_scalar(text)
        elif isinstance(node, list) and leaf.isdigit() and int(leaf) < len(node):
            node[int(leaf)] = parse_scalar(text)
        else:
            self.faults.append(f"{key}: {'.'.join(sections)} has no key {leaf!r}")

    def section(self, cls: type[T], raw: dict[str, Any], path: str) -> T | Any:
        """A `cls` made of `raw`, or None after noting what is wrong with it."""
        before = len(self.faults)
        known = fields_of(cls)
        for key in raw:
            if key not in known:
                self._unknown(key, raw[key], path, list(known))
        arguments = {}
        for key, info in known.items():
            where = f"{path}{key}"
            if key in raw:
                arguments[key] = self._value(info, raw[key], where)
            elif info.is_required():
                self.faults.append(f"{where}: is required")
            else:
                self.keep(where, info.get_default(call_default_factory=True))
        if len(self.faults) > before:
            return None
        result = cls(**arguments)
        section = path.rstrip(".")
        self.values.update({f"{path}{name}": getattr(result, name) for name in DERIVED.get(section, ())})
        return result

    def keep(self, where: str, value: Any) -> None:
        """Remember a valid value, and those below it, for the rules."""
        self.values[where] = value
        if hasattr(value, "__pydantic_fields__"):
            for key in fields_of(type(value)):
                self.keep(f"{where}.{key}", getattr(value, key))
            self.values.update({f"{where}.{name}": getattr(value, name) for name in DERIVED.get(where, ())})

    def _value(self, info: Any, value: Any, where: str) -> Any:
        variants = section_types(info.annotation)
        if variants and not (value is None and type(None) in typing.get_args(info.annotation)):
            return self._variant(variants, value, where)
        if (item := item_types(info.annotation)) and isinstance(value, list):
            items = [self._variant(item, entry, f"{where}.{i}") for i, entry in enumerate(value)]
            if None in items:
                return None
            value = items
        if (entry := value_types(info.annotation)) and isinstance(value, dict):
            entries = {str(name): self._variant(entry, part, f"{where}.{name}") for name, part in value.items()}
            if None in entries.values():
                return None
            value = entries
        return self._leaf(info, value, where)

    def _variant(self, variants: list[type], value: Any, where: str) -> Any:
        """One section out of a tagged union (or the only one there is)."""
        if not isinstance(value, dict):
            self.faults.append(f"{where} = {_shown(value)}: must be a mapping of keys")
            return None
        cls: type | None = variants[0]
        if len(variants) > 1:
            kinds = {kind_of(v): v for v in variants}
            cls = kinds.get(str(value.get("kind")))
            if cls is None:
                stated = (
                    f"{where}.kind = {value['kind']!r}: must be" if "kind" in value else f"{where}.kind: is required,"
                )
                self.faults.append(f"{stated} one of {', '.join(kinds)}")
                return None
        assert cls is not None
        result = self.section(cls, value, f"{where}.")
        if result is not None:
            self.values[where] = result
        return result

    def _leaf(self, info: Any, value: Any, where: str) -> Any:
        annotation: Any = typing.Annotated[(info.annotation, *info.metadata)] if info.metadata else info.annotation
        adapter: TypeAdapter[Any] = TypeAdapter(annotation, config=ConfigDict(strict=True, allow_inf_nan=False))
        try:
            self.values[where] = valid = adapter.validate_python(value)
        except ValidationError as error:
            complaints = dict.fromkeys(_complaint(e) for e in error.errors())
            self.faults.append(f"{where} = {_shown(value)}: {' or '.join(complaints)}")
            return None
        if beyond := [number for number in _numbers(valid) if abs(number) > _LARGEST]:
            self.faults.append(f"{where} = {_shown(beyond[0])}: must be at most {_LARGEST:.2g}, which fp32 can hold")
            return None
        if valid is not None and _is_path(annotation):
            for path in valid if isinstance(valid, list) else [valid]:
                note_path(path)
        return valid

    def _unknown(self, key: Any, value: Any, path: str, known: list[str]) -> None:
        hint = self._suggestion(str(key), path, known) or f"known here: {', '.join(known)}"
        self.faults.append(f"{path}{key} = {_shown(value)}: unknown key; {hint}")

    def _suggestion(self, key: str, path: str, known: list[str]) -> str | None:
        """The key that was meant: one of this section, or of another where that is nearer."""
        section = path.rstrip(".")
        word = section.rpartition(".")[2]
        here = {name: max(_nearness(key, name), _nearness(f"{word}_{key}", name)) for name in known}
        # Another kind of this section may have the key: it is no place to put it.
        elsewhere = {
            name: _nearness(key, name.rpartition(".")[2])
            for name in _every_key(self._root, self._prefix)
            if name.rpartition(".")[0].rpartition(".")[2] != word
        }
        nearest, near = max(elsewhere.values(), default=0.0), max(here.values(), default=0.0)
        meant = [name for name, nearness in elsewhere.items() if nearness == nearest]
        # A word that many sections have says nothing about where it belongs.
        if nearest >= _SAME_WORD and nearest > near + 0.1 and len(set(meant)) <= 2:
            return f"did you mean {' or '.join(repr(name) for name in dict.fromkeys(meant))}?"
        return f"did you mean '{max(here, key=here.__getitem__)}'?" if near >= _ALIKE else None


_MOST_SHOWN = 300
"""Characters of a wrong value."""
_ALIKE = 0.6
"""How alike an unknown key and a known one of its section must be to be the same."""
_SAME_WORD = 0.8
"""The same of a key of another section."""
_SAME_WORDS = 0.95
"""How alike a key is to one that has all its words, and others between them."""


_LARGEST = 2.0**128 * (1 - 2.0**-24)
"""In fp32."""


def _numbers(value: Any) -> Iterator[float]:
    """Those with a fraction in a value; whole ones count something, and have limits of their own."""
    if isinstance(value, float):
        yield value
    elif isinstance(value, list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _numbers(part)


def _nearness(key: str, other: str) -> float:
    words = iter(other.split("_"))
    if key != other and "_" in key and all(word in words for word in key.split("_")):
        return _SAME_WORDS
    return difflib.SequenceMatcher(None, key, other).ratio()


def _shown(value: Any) -> str:
    """A wrong value as messages give it: as much as tells which it is."""
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def _complaint(error: Any) -> str:
    if error["type"] == "literal_error":
        return f"must be one of {error['ctx']['expected'].replace(' or ', ', ')}"
    plain = _PLAIN.get(error["type"])
    said = str(error["msg"]).removeprefix("Value error, ")
    text = plain or said.replace("Input should", "must").replace("Value should", "must")
    item = [str(part) for part in error["loc"] if isinstance(part, int)]
    return f"entry {'.'.join(item)} {text}" if item else text


def _every_key(cls: type, prefix: str = "") -> Iterator[str]:
    for name, info in fields_of(cls).items():
        yield f"{prefix}{name}"
        for section in section_types(info.annotation):
            yield from _every_key(section, f"{prefix}{name}.")
        for section in item_types(info.annotation):
            yield from _every_key(section, f"{prefix}{name}.0.")
        for section in value_types(info.annotation):
            yield from _every_key(section, f"{prefix}{name}.ID.")
