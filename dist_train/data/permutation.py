"""The order of very many samples: a permutation of which any slice is had without the rest.

A cipher encrypts the position: a generalized Feistel network over the pairs of [0, a) x [0, b), whose
product is just above the length, and cycle walking over the few positions beyond it; both after Black and
Rogaway, "Ciphers with Arbitrary Finite Domains" (CT-RSA 2002), in ten rounds, as NIST's FF1 has (SP 800-38G).
Its round function is the mixer of splitmix64 (Steele, Lea and Flood, OOPSLA 2014), so it shuffles well and
hides nothing. Whole numbers only: the same on any machine.
"""

from __future__ import annotations

import math

import numpy as np

from dist_train.data.draws import mixed
from dist_train.seeds import key

ROUNDS = 10


def permuted(length: int, seed: int, first: int, last: int) -> np.ndarray:
    """What stands at the places `first` to `last` of the permutation of range(length) that `seed` chooses.

    Takes time and memory for these places only. Returns int64 `[last - first]`.

    Args:
        length: at most 2**62.
        seed: 63 bits, as `key` gives them.
    """
    rows = math.isqrt(length - 1) + 1 if length else 1
    sides = rows, -(-length // rows)
    keys = [key(seed, "round", number) for number in range(ROUNDS)]
    values = _encrypted(np.arange(first, last, dtype=np.uint64), sides, keys)
    while len(beyond := np.flatnonzero(values >= length)):  # fewer than one in the square root of length
        values[beyond] = _encrypted(values[beyond], sides, keys)
    return values.astype(np.int64)


def _encrypted(values: np.ndarray, sides: tuple[int, int], keys: list[int]) -> np.ndarray:
    """The cipher's permutation of range(sides[0] * sides[1]); uint64 throughout."""
    sizes = [np.uint64(side) for side in sides]
    halves = list(np.divmod(values, sizes[1]))
    for number, round_key in enumerate(keys):
        this = number % 2
        size, half = sizes[this], halves[this]
        half += (mixed(halves[1 - this] ^ np.uint64(round_key)) >> np.uint64(32)) * size >> np.uint64(32)
        half -= size * (half >= size)
    return halves[0] * sizes[1] + halves[1]
