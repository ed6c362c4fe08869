#!/usr/bin/env python
"""Conversations that every machine has: what the standard library says its functions do.

python examples/chat/python_chats.py CHATS.jsonl

The answer is the first line of what a function says of itself.
"""

import ast
import json
import os
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

SYSTEM = {"role": "system", "content": "Answer in one line."}


def modules() -> Iterator[dict[str, str]]:
    """Of every module of the standard library: the first line of each function by its name."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted([*library.glob("*.py"), *library.glob("[a-z]*/*.py")]):
        if any(part in ("test", "tests", "idlelib", "site-packages") for part in path.parts):
            continue
        with warnings.catch_warnings(action="ignore"):  # of escapes in old strings
            tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
        module = ".".join(path.relative_to(library).with_suffix("").parts).removesuffix(".__init__")
        said = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                lines = (ast.get_docstring(node) or "").splitlines()
                if lines and 15 <= len(lines[0]) <= 120 and lines[0] not in said.values():
                    said[f"{module}.{node.name}"] = lines[0]
        yield said


def main() -> None:
    """Write the file."""
    target = Path(sys.argv[1])
    rows = [
        {
            "messages": [
                SYSTEM,
                {"role": "user", "content": f"What does {name} do?"},
                {"role": "assistant", "content": said},
            ]
        }
        for functions in modules()
        for name, said in functions.items()
    ]
    unfinished = target.with_suffix(".unfinished")
    unfinished.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(unfinished, target)
    print(f"{target}: {len(rows):,} conversations")


if __name__ == "__main__":
    main()
