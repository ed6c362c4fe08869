"""Variables of chat templates, such as `enable_thinking`: given once, they are defaults that the template carries."""

import difflib
import json
import math
import re
from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError, meta
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_ext.config.yaml_text import parse_scalar
from megatron_ext.errors import ConfigError, DataError

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OF_ROWS = frozenset(("messages", "tools", "documents", "add_generation_prompt"))
_OF_READERS = frozenset(("raise_exception", "strftime_now"))
"""What readers of templates define for them, beside the special tokens."""
_MARK = re.compile(r"{%[-+]?\s*(?:end)?generation\s*[-+]?%}")


def read_variables(given: Sequence[str]) -> dict[str, str | int | float | bool]:
    """The variables that texts NAME=VALUE are, values as in YAML.

    Raises:
        ConfigError: one is not of this form, is what rows say, or has a value that is no text, number, true or false.
    """
    found: dict[str, str | int | float | bool] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not _NAME.fullmatch(name):
            raise ConfigError(f"--template-variables {text!r}: expected NAME=VALUE, such as enable_thinking=false")
        if name in _OF_ROWS:
            raise ConfigError(f"--template-variables {text!r}: {name} is what each row says; remove it")
        read: Any = parse_scalar(value)
        if not isinstance(read, str | int | float | bool) or (isinstance(read, float) and not math.isfinite(read)):
            raise ConfigError(f"--template-variables {text!r}: expected a text, a number, true or false behind the =")
        found[name] = read
    return found


def with_variables(template: str, given: Sequence[str]) -> str:
    """`template` with defaults for its variables, which whoever renders it may still give otherwise.

    So what is trained on, what is generated from and what an export carries are one template.

    Raises:
        ConfigError: see `read_variables`.
        DataError: the template has no such variable, or cannot be read.
    """
    variables = read_variables(given)
    if not variables:
        return template
    known = _variables_of(template)
    for name in variables:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or sorted(known)
            has = f"it has {', '.join(near)}" if near else "it has none"
            raise DataError(f"--template-variables {name}: the chat template has no such variable; {has}")
    defaults = "".join(
        f"{{% if {name} is not defined %}}{{% set {name} = {json.dumps(value, ensure_ascii=False)} %}}{{% endif %}}"
        for name, value in variables.items()
    )
    # Readers drop a line's end behind a block: the template may begin with one of its own.
    return defaults + ("\n" if template.startswith("\n") else "") + template


def names_in(template: str) -> set[str]:
    """Names that `template` takes from whoever renders it; jinja2.TemplateError where it is no template."""
    environment = ImmutableSandboxedEnvironment(extensions=[loopcontrols])
    return meta.find_undeclared_variables(environment.parse(_MARK.sub("", template)))


def _variables_of(template: str) -> set[str]:
    """Those names but for rows and special tokens."""
    try:
        names = names_in(template)
    except TemplateError as error:
        raise DataError(f"the chat template cannot be read: {error}") from error
    return {name for name in names - _OF_ROWS - _OF_READERS if not name.endswith("_token")}
