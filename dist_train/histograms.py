"""How the values of each weight are distributed, over all ranks that hold parts of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from dist_train.rows import held, is_sharded
from dist_train.runtime import Runtime

BINS = 64

# By the name of a weight: the least and the greatest value, and how many lie in each bin between them.
Histograms = dict[str, dict[str, Any]]


@torch.no_grad()
def histograms(model: nn.Module, ranks: Runtime) -> Histograms:
    """A histogram of each parameter, of its finite values: `low`, `high` and `counts`, a list of BINS.

    All ranks come here together, and all get it. Weights are copied to the CPU one by one.
    """
    limits = ranks.gather({name: _limits(_mine(weight, ranks)) for name, weight in model.named_parameters()})
    found: Histograms = {}
    for name in limits[0]:
        lows, highs = zip(*(each[name] for each in limits), strict=True)
        if min(lows) <= max(highs):
            found[name] = {"low": min(lows), "high": max(highs)}
    weights = dict(model.named_parameters())
    counts = ranks.gather({name: _counts(_mine(weights[name], ranks), **found[name]) for name in found})
    for name, histogram in found.items():
        histogram["counts"] = np.sum([each[name] for each in counts], axis=0).tolist()
    return found


def _mine(weight: torch.Tensor, ranks: Runtime) -> np.ndarray:
    """The finite values that this rank counts, float32: those it holds, of what all hold the first rank's."""
    values, _, is_first = held(weight)
    if not (is_first if is_sharded(weight) else ranks.is_main):
        return np.zeros(0, np.float32)
    array = values.detach().float().cpu().numpy().ravel()
    return array[np.isfinite(array)]


def _limits(values: np.ndarray) -> tuple[float, float]:
    """The least and the greatest value; infinite ones of none."""
    return (float(values.min()), float(values.max())) if len(values) else (np.inf, -np.inf)


def _counts(values: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.histogram(values, BINS, (low, high))[0]  # around a single value of width 1
