#!/usr/bin/env python
"""Conversations and pairs of answers that every machine has: what the standard library says its functions do.

python examples/chat/python_chats.py CHATS.jsonl PAIRS.jsonl

The answer is the first line of what a function says of itself; the answer that is not preferred is that of another
function of the same module.
"""

import ast
import itertools
import json
import os
import random
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

SYSTEM = {"role": "system", "content": "Answer in one line."}
MOST_PAIRS = 2000


def modules() -> Iterator[dict[str, str]]:
    """Of every module of the standard library that has several: the first line of each function by its name."""
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
        if len(said) > 1:
            yield said


def main() -> None:
    """Write both files."""
    chats, pairs = map(Path, sys.argv[1:])
    draws, rows, preferences = random.Random(0), [], []
    for said in modules():
        for name, answer in said.items():
            prompt = [SYSTEM, {"role": "user", "content": f"What does {name} do?"}]
            right = {"role": "assistant", "content": answer}
            other = draws.choice([line for line in said.values() if line != answer])
            wrong = {"role": "assistant", "content": other}
            rows.append({"messages": [*prompt, right]})
            preferences.append({"prompt": prompt, "chosen": [right], "rejected": [wrong]})
    draws.shuffle(preferences)
    for path, content in ((chats, rows), (pairs, list(itertools.islice(preferences, MOST_PAIRS)))):
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
        os.replace(unfinished, path)
    print(f"{chats}: {len(rows):,} conversations; {pairs}: {min(len(preferences), MOST_PAIRS):,} pairs")


if __name__ == "__main__":
    main()
