"""Random numbers are keyed, never stored: a seed is a function of what it is for."""

from __future__ import annotations

import hashlib
import struct


def key(seed: int, purpose: str, *numbers: int) -> int:
    """A seed of 63 bits that is a function of its arguments, the same on every machine."""
    data = struct.pack(f"<{1 + len(numbers)}q", seed, *numbers) + purpose.encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1
