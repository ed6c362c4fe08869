"""Damage to files, from a seed: bytes flipped, ends cut off, foreign bytes put in; and reading all that is there."""

import random
from pathlib import Path

from megatron_ext.model_io.open import open_checkpoint

FOREIGN = (b"[", b"{" * 3000, b"[" * 3000, b"9" * 6000, b"\0" * 9, b'"', b"\xff", b"1e99")


def damage(path: Path, generator: random.Random, within: int | None = None) -> None:
    """Change the file at `path` in one of these ways, its first `within` bytes alone where that is given."""
    content = bytearray(path.read_bytes())
    end = min(len(content), within or len(content))
    kind = generator.random()
    if kind < 0.6:
        for _ in range(generator.randint(1, 3)):
            position = generator.randrange(end)
            content[position] = (content[position] + generator.randint(1, 255)) % 256
    elif kind < 0.8:
        del content[generator.randrange(end) :]
    else:
        position = generator.randrange(end)
        content[position:position] = generator.choice(FOREIGN)
    path.write_bytes(content)


def read_all(path: Path) -> None:
    opened = open_checkpoint(path)
    for name in opened.tensors.specs:
        opened.tensors.read(name)
