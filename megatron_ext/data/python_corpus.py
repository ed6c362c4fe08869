"""A corpus that every machine has: the documentation and the sources of the Python that is running."""

import io
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from megatron_ext.errors import DataError
from megatron_ext.files import write_text

_LEAST_BYTES = 8 * 10**6
# Copies of other people's packages, and tests: the latter are taken only where the rest is too little.
_LEFT_OUT = ("site-packages", "dist-packages", "__pycache__", "ensurepip")
_TESTS = ("test", "tests", "idle_test", "lib2to3")


def write_python_corpus(output: str | Path) -> tuple[int, int]:
    """Write the corpus as JSONL, in a fixed order and without duplicates; return (documents, bytes of text).

    Raises:
        DataError: this Python has less than 8 MB of documentation and sources.
    """
    output = Path(output)
    seen: set[str] = set()
    size, lines = 0, io.StringIO()
    for with_tests in (False, True):
        for source, text in _documents(with_tests):
            if text.strip() and text not in seen:
                seen.add(text)
                size += len(text.encode())
                lines.write(json.dumps({"text": text, "source": source}, ensure_ascii=False) + "\n")
        if size >= _LEAST_BYTES:
            break
    if size < _LEAST_BYTES:
        raise DataError(
            f"this Python has only {size / 1e6:.1f} MB of documentation and sources; bring a corpus: CORPUS=path"
        )
    write_text(output, lines.getvalue())
    return len(seen), size


def _documents(with_tests: bool) -> Iterator[tuple[str, str]]:
    """Yield (where from, text): first the topics of `help()`, then every source file of the standard library."""
    if not with_tests:
        from pydoc_data import topics

        for name in sorted(topics.topics):
            yield f"help({name!r})", topics.topics[name]
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        is_test = any(part in _TESTS for part in parts)
        if is_test == with_tests and not any(part in _LEFT_OUT for part in parts):
            try:
                yield "/".join(parts), path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue
