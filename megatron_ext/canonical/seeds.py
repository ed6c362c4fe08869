"""Seeds drawn from names, so that random numbers depend on what they are for and not on who draws them."""

import hashlib


def seed_from_name(seed: int, name: str) -> int:
    """A seed for the random numbers of one tensor: the same in every layout, process and order of work."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
