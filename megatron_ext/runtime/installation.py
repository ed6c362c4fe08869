"""What computes on this rank: a digest of this package's own source, and the versions of what it stands on."""

import hashlib
import importlib.metadata
import platform
from pathlib import Path

import megatron_ext

_LIBRARIES = ("torch", "megatron-core", "transformer-engine", "triton", "numpy")
"""Those whose arithmetic or random numbers reach the weights, by the names of their packages."""


def installation() -> dict[str, str]:
    """Name and version of everything here whose difference from another rank's may show in what is trained."""
    own = {"megatron_ext": f"source {source_digest()}", "Python": platform.python_version()}
    return own | {name: _version(name) for name in _LIBRARIES}


def source_digest() -> str:
    """Of every source file of the package, whatever a version or a commit says of it: 12 hexadecimal digits."""
    root, digest = Path(megatron_ext.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:12]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
