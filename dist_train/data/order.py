"""The order of samples: which samples each rank reads at each step, as a pure function.

The k-th global batch is the same set of samples for any number of processes; nothing is stored, so a
run goes on from any step at once. Imports only the runtime's keyed seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from dist_train.data.permutation import permuted
from dist_train.data.windows import Groups, Windows
from dist_train.seeds import generator, key

# From so many samples on, an order in each rank's memory (8 bytes a sample) and the pause to shuffle it cost
# more than to encrypt the positions of each batch (docs/scale.md). Another number would change runs' orders.
LONG = 2**24


class Part(NamedTuple):
    """A share of a global batch, which one rank computes at a time."""

    step: int  # optimizer step, from 0
    epoch: int
    indices: np.ndarray  # [B] positions in the data set
    size: int  # how many of `indices` count: B, or 0 where a short batch left this part nothing
    total: int  # samples in the whole global batch
    number: int = 0  # of this part among all of the step


class Order:
    """Which samples are in each global batch: a function of the seed, the same for any number of processes.

    Args:
        length: samples in the data set.
        batch_size: samples per global batch.
        seed: with the epoch it determines the order.
        shuffle: a new order in each epoch, or always 0, 1, 2, ...
        drop_last: leave out a last, short global batch.
        groups: in which the samples lie; a few of them are read at a time.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        groups: Groups | None = None,
    ) -> None:
        self.length, self.batch_size, self.seed, self.shuffle = length, batch_size, seed, shuffle
        self.windows = None if groups is None else Windows(groups, seed, shuffle)
        self.steps_per_epoch = steps_per_epoch(length, batch_size, drop_last)
        self._epoch, self._positions = -1, np.empty(0, np.int64)

    def positions(self, epoch: int, first: int = 0, last: int | None = None) -> np.ndarray:
        """The positions `[last - first]` at the places `first` to `last` (the end) of an epoch's order."""
        last = self.length if last is None else min(last, self.length)
        if not self.shuffle:
            return np.arange(first, last)
        if self.windows is not None:
            return self.windows.positions(epoch, first, last)
        seed = key(self.seed, "order", epoch)
        if self.length >= LONG:
            return permuted(self.length, seed, first, last)
        if epoch != self._epoch:
            self._epoch, self._positions = (
                epoch,
                torch.randperm(self.length, generator=generator(seed)).numpy(),
            )
        return self._positions[first:last]

    def window(self, step: int) -> tuple[int, int]:
        """Which one holds the first sample of a step, as (epoch, number); only of samples in groups."""
        assert self.windows is not None
        epoch, batch = divmod(step, self.steps_per_epoch)
        return self.windows.at(epoch, batch * self.batch_size)

    def global_batch(self, step: int) -> np.ndarray:
        """The positions `[G]` of all samples of a step."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        return self.positions(epoch, batch * self.batch_size, (batch + 1) * self.batch_size)

    def parts(self, step: int, count: int, mine: range | None = None) -> list[Part]:
        """The `count` contiguous parts of a global batch; a last, short one is cut as evenly as it goes.

        Args:
            mine: numbers of the parts that are wanted, or all; no other positions are looked up.
        """
        mine = range(count) if mine is None else mine
        epoch, batch = divmod(step, self.steps_per_epoch)
        begin = batch * self.batch_size
        total = min(self.batch_size, self.length - begin)
        each, longer = divmod(total, count)  # the first ones are longer by one sample
        bounds = [begin + n * each + min(n, longer) for n in range(mine.start, mine.stop + 1)]
        positions = self.positions(epoch, bounds[0], bounds[-1])
        cut = []
        for number, first, last in zip(mine, bounds, bounds[1:], strict=False):
            indices = positions[first - bounds[0] : last - bounds[0]]
            # A rank that got nothing still takes part in the backward pass: with one sample of weight 0.
            filled = indices if last > first else self.positions(epoch, begin, begin + 1)
            cut.append(Part(step, epoch, filled, last - first, total, number))
        return cut


class DistributedSampler:
    """The parts that one rank computes in some steps, for DataLoader's `batch_sampler`.

    Args:
        order: of the samples.
        steps: optimizer steps, counted over all epochs.
        parts: into which each global batch is cut; rank r of W computes the r-th P / W of them.
        rank, world_size: this process among all.
        soon: told which groups of samples come next, in their order, whenever that changes.
    """

    def __init__(
        self,
        order: Order,
        steps: range,
        parts: int = 1,
        rank: int = 0,
        world_size: int = 1,
        soon: Callable[[Iterator[int]], None] | None = None,
    ) -> None:
        self.order, self.steps, self.parts, self.soon = order, steps, parts, soon
        self.mine = range(rank * parts // world_size, (rank + 1) * parts // world_size)

    def __len__(self) -> int:
        return len(self.steps) * len(self.mine)

    def __iter__(self) -> Iterator[Part]:
        announced = None
        for step in self.steps:
            if self.soon and self.order.windows and announced != (window := self.order.window(step)):
                self.soon(self.order.windows.ahead(*window))
                announced = window
            yield from self.order.parts(step, self.parts, self.mine)


class EvalSampler:
    """Each sample once, in batches that are the same for any world size: rank r of W reads the r-th share of
    them; nothing is padded.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        groups: Groups | None = None,
        soon: Callable[[Iterator[int]], None] | None = None,
    ) -> None:
        batches = -(-length // batch_size)
        self.length, self.batch_size = length, batch_size
        self.groups, self.soon = groups, soon
        self.mine = range(batches * rank // world_size, batches * (rank + 1) // world_size)

    def __len__(self) -> int:
        return len(self.mine)

    def __iter__(self) -> Iterator[Part]:
        announced = None
        for number in self.mine:
            first = number * self.batch_size
            if self.soon and self.groups and announced != (group := self.groups.of(first)):
                last = self.groups.of(min(self.mine.stop * self.batch_size, self.length) - 1)
                self.soon(iter(range(group, last + 1)))
                announced = group
            indices = np.arange(first, min(first + self.batch_size, self.length))
            yield Part(0, 0, indices, len(indices), len(indices), number)


def steps_per_epoch(length: int, batch_size: int, drop_last: bool) -> int:
    """Optimizer steps in an epoch of `length` samples."""
    return length // batch_size if drop_last else -(-length // batch_size)
