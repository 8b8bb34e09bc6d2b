"""What a data set offers: any map-style one will do, and some can do more."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Subset

from dist_train.data.windows import Groups


class Source(Protocol):
    """A data set. `__len__` and `__getitem__` suffice, all else may be missing.

    A subclass that gives other samples than its base, by a `__getitem__` of its own, takes over none of
    `all_labels`, `read_many`, `groups`, `soon` and `in_threads`.
    """

    classes: Sequence[str]  # the names of the classes, by their numbers
    note: str  # what the user should know about where the data came from
    is_images: bool  # whether inputs are images, to be transformed and normalized; True where it is missing
    # Whether threads may read samples at once: nothing is drawn at random, and images are tensors [C, H, W].
    in_threads: bool

    def __len__(self) -> int:
        """The number of samples."""
        ...

    def __getitem__(self, index: int) -> Any:
        """A sample: a pair (input, target), each a tensor, a number, or a tuple or dict of such.

        An image is a tensor `[C, H, W]`, an array `[H, W]` or `[H, W, C]`, or a PIL image. A sample that is
        a dict, or a tuple of another length, is all input and has no target: a task of one's own takes it.
        """
        ...

    def path(self, index: int) -> Path | str:
        """The file of a sample, or what else tells where it is, for messages and records."""
        ...

    def all_labels(self) -> torch.Tensor:
        """The labels `[N, ...]` of all samples, so that a wrong one is told at the start."""
        ...

    def read_many(self, index: torch.Tensor) -> tuple[Any, Any]:
        """Inputs and targets of the samples `index` `[B]` at once, as a batch has them.

        Only for samples in memory that are the same each time. No worker processes are needed for them.
        """
        ...

    def groups(self) -> Groups:
        """How samples lie together, where it costs less to read those that do at one time."""
        ...

    def soon(self, groups: Iterator[int]) -> None:
        """Hears which groups will be read next, in this order, so that they may be fetched.

        Comes from the process that trains, not from its workers; a group may come twice.
        """
        ...


class View:
    """A data set as the rest of the package asks it; behind torch's Subset it asks the whole set."""

    def __init__(self, source: Any) -> None:
        self.positions: np.ndarray | None = None  # of each sample in `whole`, where they differ
        while type(source) is Subset:
            positions = np.asarray(source.indices)
            self.positions = positions if self.positions is None else positions[self.positions]
            source = source.dataset
        self.whole = source
        self.is_images = bool(getattr(source, "is_images", True))
        self.can_read_many = self._own("read_many") is not None
        self.in_threads = bool(self._own("in_threads"))
        self.soon = self._own("soon")  # (groups: Iterator[int]) -> None

    def __len__(self) -> int:
        return len(self.whole if self.positions is None else self.positions)

    def __getitem__(self, index: int) -> Any:
        return self.whole[self._position(index)]

    def path(self, index: int) -> Path | str | None:
        """The file of a sample, if there is one."""
        path = getattr(self.whole, "path", None)
        return path(self._position(index)) if callable(path) else None

    def all_labels(self) -> torch.Tensor | None:
        """The labels `[N, ...]` of all samples, if they are at hand."""
        method = self._own("all_labels")
        if method is None:
            return None
        labels: torch.Tensor = method()
        return labels if self.positions is None else labels[torch.from_numpy(self.positions)]

    def read_many(self, index: torch.Tensor) -> tuple[Any, Any]:
        """Inputs and targets of many samples at once, where the data set can do that."""
        inputs, targets = self.whole.read_many(
            index if self.positions is None else torch.from_numpy(self.positions)[index]
        )
        return inputs, targets

    def groups(self) -> Groups | None:
        """How samples lie together, if they do; nothing of it is left in an order of the user's own."""
        method = self._own("groups")
        groups: Groups | None = method() if method else None
        if groups is None or self.positions is None:
            return groups
        if (np.diff(self.positions) <= 0).any():
            return None
        bounds = np.concatenate([[0], np.cumsum(groups.sizes)])
        return groups._replace(sizes=np.diff(np.searchsorted(self.positions, bounds)))

    def _position(self, index: int) -> int:
        return index if self.positions is None else int(self.positions[index])

    def _own(self, name: str) -> Any:
        """A method or value that fits to the samples: none of a base whose `__getitem__` is replaced."""
        for cls in type(self.whole).__mro__:
            if name in vars(cls):
                return getattr(self.whole, name)
            if "__getitem__" in vars(cls):
                return None
        return None
