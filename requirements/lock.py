#!/usr/bin/env python
"""Write lock-3.X.txt: the versions that pip resolves today for what the framework, its tests and its checks need.

  python3.12 requirements/lock.py        for the Python that runs it; `make lock` for every Python that has a lock

A lock names versions only: no index, no host, no hash, so that every build of a version will do. What torch asks for on
one platform alone is left to it: these are the CUDA libraries, which only some of its builds need.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

try:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
except ImportError:  # a bare environment has pip, and pip has it
    from pip._vendor.packaging.requirements import Requirement
    from pip._vendor.packaging.utils import canonicalize_name

HERE = Path(__file__).resolve().parent
PROJECT = "megatron-ext"
EXTRAS = ("dev",)


def resolve() -> dict[str, Any]:
    """Pip's report on an installation into an empty environment, without installing anything."""
    with tempfile.TemporaryDirectory() as directory:
        report = Path(directory) / "report.json"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--dry-run"]
        asked = ["-r", str(HERE / "cpu.txt"), f"{HERE.parent}[{','.join(EXTRAS)}]"]
        subprocess.run([*pip, "--ignore-installed", "--report", str(report), *asked], check=True)
        return json.loads(report.read_text())


def needed(report: dict[str, Any]) -> dict[str, str]:
    """Name and version of everything reached from the project, but for torch's CUDA libraries."""
    metadata = {canonicalize_name(item["metadata"]["name"]): item["metadata"] for item in report["install"]}
    versions: dict[str, str] = {}
    waiting, seen = [(PROJECT, extra) for extra in ("", *EXTRAS)], set()
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen or name not in metadata:
            continue
        seen.add((name, extra))
        if name != PROJECT:
            versions[name] = re.sub(r"\+.*", "", metadata[name]["version"])  # 2.13.0+cpu is a build of 2.13.0
        for line in metadata[name].get("requires_dist", ()):
            wanted = Requirement(line)
            environment = {**report["environment"], "extra": extra}
            of_a_platform = name == "torch" and "platform" in str(wanted.marker)
            if not of_a_platform and (wanted.marker is None or wanted.marker.evaluate(environment)):
                waiting += [(canonicalize_name(wanted.name), e) for e in ("", *wanted.extras)]
    return dict(sorted(versions.items()))


def main() -> None:
    """Resolve, and replace the lock of this Python."""
    python = "{}.{}".format(*sys.version_info)
    versions = needed(resolve())
    lock = HERE / f"lock-{python}.txt"
    lines = [f"# Resolved together for Python {python}; `make setup` installs them. Written by `make lock`."]
    lines += [f"{name}=={version}" for name, version in versions.items()]
    lock.write_text("\n".join(lines) + "\n")
    print(f"{lock.relative_to(HERE.parent)}: {len(versions)} packages, among them", end=" ")
    print(*(f"{name} {versions[name]}" for name in ("torch", "megatron-core", "transformers")), sep=", ")


if __name__ == "__main__":
    main()
