"""The order of samples that lie in groups, such as shards: only a few groups are read at a time.

In each epoch the groups are permuted, and so many of them at a time make a window, whose samples are
permuted. Both are functions of (seed, epoch), as the order of samples that lie alone is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from dist_train.data.permutation import permuted
from dist_train.seeds import generator, key


class Groups(NamedTuple):
    """How a data set's samples lie together: first all of group 0, then all of group 1, and so on."""

    sizes: np.ndarray  # [S] samples in each group
    window: int  # groups whose samples are mixed with each other

    def of(self, position: int) -> int:
        """The group that holds a sample."""
        return int(np.searchsorted(np.cumsum(self.sizes), position, side="right"))


class Plan(NamedTuple):
    """The windows of an epoch."""

    epoch: int
    groups: np.ndarray  # [S] in the order in which they are read
    ends: np.ndarray  # [W] the place after the last one of each window


class Windows:
    """The order of the samples in `groups`, as a function of `seed` and the epoch."""

    def __init__(self, groups: Groups, seed: int, shuffle: bool = True) -> None:
        self.sizes, self.window = groups
        self.firsts = np.concatenate([[0], np.cumsum(self.sizes)])
        self.seed, self.shuffle = seed, shuffle
        self._plan = Plan(-1, self.sizes, self.sizes)
        self._kept: dict[tuple[int, int], np.ndarray] = {}  # samples of the last windows

    def positions(self, epoch: int, first: int, last: int) -> np.ndarray:
        """The positions `[last - first]` at the places `first` to `last` of an epoch's order."""
        plan = self._planned(epoch)
        found = [np.empty(0, np.int64)]
        for number in range(self.at(epoch, first)[1], len(plan.ends)):
            begin = int(plan.ends[number - 1]) if number else 0
            if begin >= last:
                break
            found.append(self._samples(plan, number)[max(0, first - begin) : last - begin])
        return np.concatenate(found)

    def at(self, epoch: int, place: int) -> tuple[int, int]:
        """The window that holds a place of an epoch's order, as (epoch, number)."""
        return epoch, int(np.searchsorted(self._planned(epoch).ends, place, side="right"))

    def ahead(self, epoch: int, number: int) -> Iterator[int]:
        """The groups from a window on in the order in which they are needed, to the end of the next epoch."""
        yield from self._planned(epoch).groups[number * self.window :].tolist()
        yield from self._planned(epoch + 1).groups.tolist()

    def _planned(self, epoch: int) -> Plan:
        if self._plan.epoch != epoch:
            count = len(self.sizes)
            groups = np.arange(count)
            if self.shuffle:
                groups = permuted(count, key(self.seed, "groups", epoch), 0, count)
            lasts = np.cumsum(self.sizes[groups])
            self._plan = Plan(epoch, groups, np.append(lasts[self.window - 1 : -1 : self.window], lasts[-1]))
        return self._plan

    def _samples(self, plan: Plan, number: int) -> np.ndarray:
        """The samples of a window in their order."""
        kept = self._kept.pop((plan.epoch, number), None)
        if kept is None:
            groups = plan.groups[number * self.window : (number + 1) * self.window]
            kept = np.concatenate([np.arange(self.firsts[g], self.firsts[g + 1]) for g in groups])
            if self.shuffle:
                seed = key(self.seed, "window", plan.epoch, number)
                kept = kept[torch.randperm(len(kept), generator=generator(seed)).numpy()]
        self._kept[plan.epoch, number] = kept
        while len(self._kept) > 2:  # a batch may end in the next one
            del self._kept[next(iter(self._kept))]
        return kept
