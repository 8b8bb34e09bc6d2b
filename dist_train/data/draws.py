"""Random numbers of many samples at once, each a function of (seed, epoch, index of the sample).

Each sample has a generator of its own, splitmix64 (Steele, Lea and Flood, OOPSLA 2014), mixing a counter.
So what is drawn for a sample is the same in any batch, thread and process, in whatever order; and on any
machine, as whole numbers are. torch's generators are left alone.
"""

from __future__ import annotations

from functools import cache

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


def beta(alpha: float, drawn: np.ndarray) -> np.ndarray:
    """Quantiles of Beta(alpha, alpha): numbers that are `drawn` evenly from 0 to 1 become ones spread so."""
    areas, w, power = _half_of_beta(alpha)
    lower = np.interp(np.minimum(drawn, 1 - drawn), areas, w) ** (1 / power)
    return np.where(drawn < 0.5, lower, 1 - lower)


@cache
def _half_of_beta(alpha: float) -> tuple[np.ndarray, np.ndarray, float]:
    """The area `[N]` under the density of Beta(alpha, alpha) up to x, at most 0.5; w = x ** power `[N]`.

    By the trapezoidal rule over w, with a power by which the density has no pole.
    """
    power = min(alpha, 1.0)
    w = np.linspace(0, 0.5**power, 2**12)
    x = w ** (1 / power)
    density = x ** (alpha - power) * (1 - x) ** (alpha - 1)
    areas = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return areas / (2 * areas[-1]), w, power
