"""A corpus that every machine has: the documentation and the sources of the Python that is running."""

import ast
import io
import json
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from megatron_ext.errors import DataError
from megatron_ext.files import write_text

Kind = Literal["all", "code", "documentation"]
"""The sources and the topics of `help()`; the sources; these topics and what the sources say of themselves."""

_LEAST_BYTES = {"all": 8 * 10**6, "code": 8 * 10**6, "documentation": 10**6}
_LEAST_CHARACTERS = 200
"""Of a docstring that is a document: shorter ones are single lines, which say little alone."""
# Copies of other people's packages, and tests: the latter are taken only where the rest is too little.
_LEFT_OUT = ("site-packages", "dist-packages", "__pycache__", "ensurepip")
_TESTS = ("test", "tests", "idle_test", "lib2to3")


def write_python_corpus(output: str | Path, kind: Kind = "all") -> tuple[int, int]:
    """Write the corpus as JSONL, in a fixed order and without duplicates; return (documents, bytes of text).

    Raises:
        DataError: this Python has too little of it: 8 MB, of documentation 1 MB.
    """
    output = Path(output)
    seen: set[str] = set()
    size, lines = 0, io.StringIO()
    for with_tests in (False, True):
        for source, text in _documents(kind, with_tests):
            if text.strip() and text not in seen:
                seen.add(text)
                size += len(text.encode())
                lines.write(json.dumps({"text": text, "source": source}, ensure_ascii=False) + "\n")
        if size >= _LEAST_BYTES[kind]:
            break
    if size < _LEAST_BYTES[kind]:
        what = {"all": "documentation and sources", "code": "sources", "documentation": "documentation"}[kind]
        raise DataError(f"this Python has only {size / 1e6:.1f} MB of {what}; bring a corpus: CORPUS=path")
    write_text(output, lines.getvalue())
    return len(seen), size


def _documents(kind: Kind, with_tests: bool) -> Iterator[tuple[str, str]]:
    """Yield (where from, text): first the topics of `help()`, then the standard library."""
    if not with_tests and kind != "code":
        from pydoc_data import topics

        yield from ((f"help({name!r})", topics.topics[name]) for name in sorted(topics.topics))
    for name, text in _files(with_tests):
        if kind == "documentation":
            yield from _docstrings(name, text)
        else:
            yield name, text


def _files(with_tests: bool) -> Iterator[tuple[str, str]]:
    """Yield the name and the text of every source file of the standard library; either its tests or all else."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        is_test = any(part in _TESTS for part in parts)
        if is_test == with_tests and not any(part in _LEFT_OUT for part in parts):
            try:
                yield "/".join(parts), path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue


def _docstrings(name: str, source: str) -> Iterator[tuple[str, str]]:
    """Yield what modules, classes and functions of a source file say of themselves."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of escapes in old strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) >= _LEAST_CHARACTERS:
                yield f"{name}: {getattr(node, 'name', 'module')}", text
