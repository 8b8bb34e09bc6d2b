"""Random numbers of many samples at once, each a function of (seed, epoch, index of the sample).

Each sample has a generator of its own, splitmix64 (Steele, Lea and Flood, OOPSLA 2014), mixing a counter.
So what is drawn for a sample is the same in any batch, thread and process, in whatever order; and on any
machine, as whole numbers are. torch's generators are left alone.
"""

from __future__ import annotations

import numpy as np

from dist_train.seeds import key

GAMMA = np.uint64(0x9E3779B97F4A7C15)  # by which the counter of splitmix64 goes on


def uniform(seed: int, epoch: int, indices: np.ndarray, purpose: str, count: int) -> np.ndarray:
    """`count` numbers from 0 to below 1 for each sample, float64 `[B, count]`.

    Args:
        indices: of the samples in their data set, `[B]`.
        purpose: a name; draws for other purposes are other ones.
    """
    begins = mixed(indices.astype(np.uint64) * GAMMA + np.uint64(key(seed, purpose, epoch)))
    counters = np.arange(1, count + 1, dtype=np.uint64) * GAMMA
    bits = mixed(begins[:, None] + counters)
    return (bits >> np.uint64(11)) * 2.0**-53


def mixed(values: np.ndarray) -> np.ndarray:
    """A random-looking number of 64 bits for each, splitmix64's; multiplication wraps around."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
