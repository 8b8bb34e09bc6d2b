"""The order of samples: which samples each rank reads at each step, as a pure function.

The k-th global batch is the same set of samples for any number of processes; nothing is stored, so a
run goes on from any step at once. Imports only the runtime's keyed seeds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from dist_train.data.permutation import permuted
from dist_train.seeds import generator, key

# From so many samples on, an order in each rank's memory (8 bytes a sample) and the pause to shuffle it cost
# more than to encrypt the positions of each batch (docs/scale.md). Another number would change runs' orders.
LONG = 2**24


class Part(NamedTuple):
    """One rank's micro-batch of a step."""

    step: int  # optimizer step, from 0
    epoch: int
    indices: np.ndarray  # [B] positions in the data set
    size: int  # how many of `indices` count: B, or 0 where a short batch left this rank nothing
    total: int  # samples in the whole global batch


class DistributedSampler:
    """The micro-batches of one rank for the steps from `start` to `stop`, for DataLoader's `batch_sampler`.

    A global batch is cut into world size x accumulate contiguous parts, rank by rank. A last, short one is
    cut as evenly as it goes; its samples weigh what they should because the loss is divided by `total`.

    Args:
        length: samples in the data set.
        batch_size: samples per global batch.
        seed: with the epoch it determines the order.
        shuffle: a new order in each epoch, or always 0, 1, 2, ...
        drop_last: leave out a last, short global batch.
        rank, world_size: this process among all.
        accumulate: micro-batches per step on each rank.
        start, stop: optimizer steps, counted over all epochs.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        start: int = 0,
        stop: int | None = None,
    ) -> None:
        self.length, self.batch_size, self.seed, self.shuffle = length, batch_size, seed, shuffle
        self.rank, self.world_size, self.accumulate = rank, world_size, accumulate
        self.steps_per_epoch = steps_per_epoch(length, batch_size, drop_last)
        self.start = start
        self.stop = self.steps_per_epoch if stop is None else stop
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __len__(self) -> int:
        return (self.stop - self.start) * self.accumulate

    def __iter__(self) -> Iterator[Part]:
        first = self.rank * self.accumulate
        for step in range(self.start, self.stop):
            for part in range(first, first + self.accumulate):
                yield self.part(step, part)

    def order(self, epoch: int, first: int = 0, last: int | None = None) -> np.ndarray:
        """The positions `[last - first]` at the places `first` to `last` (the end) of an epoch's order."""
        last = self.length if last is None else min(last, self.length)
        if not self.shuffle:
            return np.arange(first, last)
        seed = key(self.seed, "order", epoch)
        if self.length >= LONG:
            return permuted(self.length, seed, first, last)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, torch.randperm(self.length, generator=generator(seed)).numpy()
        return self._order[first:last]

    def global_batch(self, step: int) -> np.ndarray:
        """The positions `[G]` of all samples of a step, the same for any number of processes."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        return self.order(epoch, batch * self.batch_size, (batch + 1) * self.batch_size)

    def part(self, step: int, part: int) -> Part:
        """Part number `part` (rank x accumulate + micro-batch) of a step's global batch."""
        batch = self.global_batch(step)
        parts = self.world_size * self.accumulate
        if len(batch) == self.batch_size:
            indices = batch[part * len(batch) // parts : (part + 1) * len(batch) // parts]
        else:
            indices = np.array_split(batch, parts)[part]
        size = len(indices)
        # A rank that got nothing still takes part in the backward pass: with one sample of weight 0.
        filled = indices if size else batch[:1]
        return Part(step, step // self.steps_per_epoch, filled, size, len(batch))


class EvalSampler:
    """Each sample once: rank r of W reads a contiguous share of 0..length, in batches; nothing is padded."""

    def __init__(self, length: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.first = length * rank // world_size
        self.last = length * (rank + 1) // world_size
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-(self.last - self.first) // self.batch_size)

    def __iter__(self) -> Iterator[Part]:
        for start in range(self.first, self.last, self.batch_size):
            indices = np.arange(start, min(start + self.batch_size, self.last))
            yield Part(0, 0, indices, len(indices), len(indices))


def steps_per_epoch(length: int, batch_size: int, drop_last: bool) -> int:
    """Optimizer steps in an epoch of `length` samples."""
    return length // batch_size if drop_last else -(-length // batch_size)
