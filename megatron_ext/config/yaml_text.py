"""YAML as people mean it: 1e-4 is a number, off is a word, and a key written twice is an error."""

import re
from pathlib import Path
from typing import Any

import yaml

from megatron_ext.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's booleans and numbers, without dates, refusing duplicate keys."""


# YAML 1.1 (PyYAML) reads `no`, `off` and `on` as booleans, `1e-4` as a string, `4:16` and `0400` as 256 and
# `2024-02-30` as a date that does not exist; YAML 1.2 does none of this.
_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag.rpartition(":")[2] not in ("bool", "float", "int", "timestamp")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$|^0x[0-9a-fA-F]+$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?$|^[-+]?[0-9]+[eE][-+]?[0-9]+$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


_MOST_UNFOLDED = 100_000
"""Values that aliases may add to a file."""
_MOST_BYTES = 1 << 24
"""Of a file."""


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes every string which either version of YAML would read as something else."""


_Dumper.yaml_implicit_resolvers = {
    first: [*yaml.SafeDumper.yaml_implicit_resolvers.get(first, []), *resolvers]
    for first, resolvers in {
        **dict.fromkeys(yaml.SafeDumper.yaml_implicit_resolvers, ()),
        **_Loader.yaml_implicit_resolvers,
    }.items()
}


def _mapping_without_duplicates(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key!r} is written twice", key_node.start_mark
            )
        seen.add(key)
    return dict(yaml.SafeLoader.construct_mapping(loader, node, deep=True))


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping_without_duplicates)


def read_yaml(path: str | Path) -> Any:
    """Parse the YAML file at `path`.

    Raises:
        ConfigError: it cannot be read or is not YAML; says where.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(_MOST_BYTES + 1)  # what is given may never end
        text = content.decode()
    except IsADirectoryError as error:
        inside = ", ".join(sorted(file.name for file in Path(path).glob("*.y*ml"))[:3])
        raise ConfigError(f"{path}: is a directory; give a YAML file{inside and f' ({inside} in it)'}") from error
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 (byte {error.start})") from error
    if len(content) > _MOST_BYTES:
        raise ConfigError(f"{path}: more than {_MOST_BYTES >> 20} MiB: no configuration is so long")
    return parse_yaml(text, source=str(path))


def parse_yaml(text: str, *, source: str) -> Any:
    """Parse YAML `text`; `source` names it in errors."""
    try:
        return _load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise ConfigError(f"{source}{where}: {error.problem}") from error
    except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: not YAML that can be read here ({error})") from error


def _load(text: str) -> Any:
    """The value of YAML `text`; raises what yaml raises, and ValueError where aliases unfold without end."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        sizes: dict[int, int] = {}
        unfolded = _unfolded(node, sizes)
        if unfolded > _MOST_UNFOLDED + len(sizes):
            raise ValueError(f"its aliases unfold to {unfolded:.3g} values")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _unfolded(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Values at and below `node`, each alias counted with what it stands for."""
    if id(node) not in sizes:
        sizes[id(node)] = _MOST_UNFOLDED * 1000  # what holds itself has no end
        below = node.value if isinstance(node, yaml.CollectionNode) else ()
        parts = [part for entry in below for part in (entry if isinstance(entry, tuple) else (entry,))]
        sizes[id(node)] = 1 + sum(_unfolded(part, sizes) for part in parts)
    return sizes[id(node)]


def parse_scalar(text: str) -> Any:
    """The value that `text` has in a YAML file; text that is not YAML stands for itself."""
    try:
        return _load(text)
    except (yaml.YAMLError, TypeError, ValueError, RecursionError):
        return text


def dump_yaml(value: Any) -> str:
    """`value` as YAML that `read_yaml` turns into an equal one, keys in their given order."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
    if parse_scalar(text) == value:
        return text
    # PyYAML writes a few line separators of Unicode as they are and reads them as line ends.
    return str(yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=False, width=120))
