"""Samples: a data set with its transforms, and the micro-batches that are made of it.

Where samples are in memory and no transform is random, they are fetched and transformed all at once, and
batches are slices of the result; all else is done sample by sample, with the sample's own seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, Subset, default_collate, get_worker_info

from dist_train.config import UserError
from dist_train.data.images import BadSample, ImageFiles, InMemory, as_text
from dist_train.data.labels import first_wrong, wrong
from dist_train.data.order import Part
from dist_train.data.transforms import ImageTransform, OneHot
from dist_train.seeds import seed_sample

UNREADABLE = (BadSample, OSError, SyntaxError)  # the latter two are PIL's
MOST_BAD = 100  # in a row: then it isn't the samples


class Batch(NamedTuple):
    """What the model gets, and which part of which step it is."""

    inputs: torch.Tensor  # [B, C, H, W]
    targets: torch.Tensor  # [B, ...]
    part: Part
    bad: tuple[tuple[str, str], ...] = ()  # samples that could not be read, and why

    def to(self, device: torch.device, channels_last: bool = False) -> Batch:
        """The batch on `device`; a copy from page-locked memory does not wait."""
        layout = torch.channels_last if channels_last and self.inputs.ndim == 4 else torch.preserve_format
        return Batch(
            self.inputs.to(device, non_blocking=True, memory_format=layout),
            self.targets.to(device, non_blocking=True),
            self.part,
            self.bad,
        )


class Unreadable(NamedTuple):
    """Stands where a worker could not read a batch; the error comes up, as it is, where it is used."""

    error: UserError

    def to(self, device: torch.device, channels_last: bool = False) -> Batch:
        """Raises the error."""
        raise self.error


class Samples(Dataset[Any]):
    """`source` with its transforms; `__getitems__` takes a list of `Part` and returns a `Batch` of each."""

    def __init__(
        self,
        source: Any,
        transform: ImageTransform,
        target_transform: Callable[[Any], Any] | None = None,
        seed: int = 0,
        on_bad: str = "stop",  # "stop", "replace" or "leave out"
        classes: int = 0,
        strict: bool = False,  # whether targets must be classes: see `labels.wrong`
    ) -> None:
        self.source, self.transform, self.target_transform = source, transform, target_transform
        self.seed, self.on_bad, self.classes, self.strict = seed, on_bad, classes, strict
        self.checked = False  # whether all labels were found to be right

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Any]:
        return self.sample(index, epoch=0)

    def __getitems__(self, parts: Sequence[Part]) -> Sequence[Batch | Unreadable]:
        try:
            return self.batches(parts)
        except UserError as error:
            error.everywhere = False  # other ranks read other samples
            if get_worker_info() is None:
                raise
            return [Unreadable(error)]  # torch would put a traceback into its text

    def batches(self, parts: Sequence[Part]) -> list[Batch]:
        """The micro-batches of these parts, transformed as their epochs want it."""
        memory = in_memory(self.source)
        if memory is None or not self.is_batched:
            return [self.batch(part) for part in parts]
        index = torch.from_numpy(np.concatenate([part.indices for part in parts]))
        if isinstance(self.source, Subset):
            index = torch.as_tensor(self.source.indices)[index]
        # index_select copies whole images; memory.images[index] goes byte by byte, at ten times the cost.
        images, targets = memory.images.index_select(0, index), memory.labels.index_select(0, index)
        if isinstance(self.target_transform, OneHot):  # of labels that were checked at the start
            targets = self.target_transform(targets)
        elif self.target_transform is not None:
            numbers = np.concatenate([part.indices for part in parts]).tolist()
            rows = [self.target(label, i) for label, i in zip(targets, numbers, strict=True)]
            targets = torch.stack([torch.as_tensor(row) for row in rows])
        targets = self.numbers(targets)
        images, sizes = self.transform(images), [len(part.indices) for part in parts]
        return [Batch(*rows) for rows in zip(images.split(sizes), targets.split(sizes), parts, strict=True)]

    def batch(self, part: Part) -> Batch:
        """A micro-batch, fetched sample by sample."""
        samples, bad = self.samples(part)
        shapes = {tuple(image.shape): None for image, _ in samples}
        if len(shapes) > 1:
            one, other = [list(shape) for shape in shapes][:2]
            raise UserError(
                f"{self.transform.where}: images of shapes {one} and {other} don't fit into one batch;"
                " give them one size, as by {Resize: {size: [64, 64]}}."
            )
        filled = samples or [self.readable(0, part.epoch)]
        inputs, targets = default_collate(filled)
        if not isinstance(targets, torch.Tensor):
            raise UserError(
                f"data: a target is of type {type(filled[0][1]).__name__}; make it a number or a tensor, as"
                " by data.target_transform."
            )
        targets = self.numbers(targets)
        return Batch(inputs[: len(samples)], targets[: len(samples)], part, tuple(bad))

    def samples(self, part: Part) -> tuple[list[tuple[torch.Tensor, Any]], list[tuple[str, str]]]:
        """The samples of a micro-batch, and those that can't be read, with the reason.

        A bad one is replaced by the next one of the data set that can be read, or left out. Raises
        UserError where neither is wanted.
        """
        if self.on_bad == "stop":
            return [self.sample(int(index), part.epoch) for index in part.indices], []
        samples: list[tuple[torch.Tensor, Any]] = []
        bad: list[tuple[str, str]] = []
        for index in part.indices.tolist():
            try:
                samples.append(self.sample(index, part.epoch))
            except UNREADABLE as error:
                bad.append((self.name(index), str(error)))
                if self.on_bad == "replace":
                    samples.append(self.readable(index + 1, part.epoch, bad))
        return samples, bad

    def readable(
        self, index: int, epoch: int, bad: list[tuple[str, str]] | None = None
    ) -> tuple[torch.Tensor, Any]:
        """The first sample from `index` on that can be read; those before it are added to `bad`.

        Raises UserError where too many in a row can't be read.
        """
        for tried in range(index, index + MOST_BAD):
            place = tried % len(self)
            try:
                return self.sample(place, epoch)
            except UNREADABLE as error:
                last = str(error)
                if bad is not None:
                    bad.append((self.name(place), last))
        raise UserError(f"{last} Nor could any of the {MOST_BAD - 1} samples before it be read.")

    def name(self, index: int) -> str:
        """The path of a sample's file, or its number where there is none."""
        source: Any = self.source
        if isinstance(source, Subset):
            source, index = source.dataset, source.indices[index]
        return as_text(source.path(index)) if hasattr(source, "path") else f"sample {index}"

    def sample(self, index: int, epoch: int) -> tuple[torch.Tensor, Any]:
        """One transformed sample as (image `[C, H, W]`, target), as this epoch sees it."""
        seed_sample(self.seed, epoch, index, everything=not self.is_plain)
        image, label = self.pair(index)
        label = self.target(label, index)
        return self.transform(_copy(image) if self.transform.steps else image), label

    def pair(self, index: int) -> tuple[Any, Any]:
        """A sample's image and label as the data set gives them."""
        item = self.source[index]
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise UserError(
                f"data: {self.name(index)} is a {type(item).__name__}, not a pair (image, label)."
            )
        return item[0], item[1]

    def target(self, label: Any, index: int) -> Any:
        """The target of a sample with this label. Raises UserError, naming it, for one that can't be."""
        if self.checked and self.target_transform is None:
            return label
        reason = ""
        if isinstance(self.target_transform, OneHot):
            reason = wrong(label, self.classes, strict=True)
        if self.target_transform is not None and not reason:
            label = self.target_transform(_copy(label))
        if reason := reason or wrong(label, self.classes, self.strict):
            raise UserError(f"data: the label of {self.name(index)} {reason}.")
        return label

    def numbers(self, targets: torch.Tensor) -> torch.Tensor:
        """Class numbers as int64: torch's loss takes no other; all other targets as they are."""
        whole = targets.ndim == 1 and not targets.is_floating_point()
        return targets.long() if self.strict and whole else targets

    def check_labels(self, part: str) -> None:
        """Raises UserError for a wrong one, where the labels of all samples are at hand."""
        whole: Any = self.source.dataset if isinstance(self.source, Subset) else self.source
        by_number = isinstance(self.target_transform, OneHot)
        if type(whole) not in (InMemory, ImageFiles) or (self.target_transform and not by_number):
            return
        labels = torch.as_tensor(whole.labels)
        if isinstance(self.source, Subset):
            labels = labels[torch.as_tensor(self.source.indices)]
        if found := first_wrong(labels, self.classes, self.strict or by_number):
            place, reason = found
            raise UserError(f"data: in the {part} set, the label of {self.name(place)} {reason}.")
        self.checked = True

    @property
    def is_batched(self) -> bool:
        """Whether samples are in memory, and their transforms take whole batches and are not random."""
        return self.transform.batched and in_memory(self.source) is not None

    @property
    def is_plain(self) -> bool:
        """Whether source and transforms are ours, so that all they draw is torch's."""
        return self.transform.ours and in_memory(self.source) is not None


def _copy(value: Any) -> Any:
    """A copy for a transform: one that works in place must not reach the data set's own."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    return value.copy() if hasattr(value, "copy") else value


def in_memory(source: Any) -> InMemory | None:
    """The data set in memory behind `source`, if there is one."""
    base = source.dataset if isinstance(source, Subset) else source
    return base if type(base) is InMemory else None
