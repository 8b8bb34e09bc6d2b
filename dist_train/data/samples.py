"""Samples: a data set with its transforms, and the micro-batches that are made of it.

Where samples are in memory and their transforms are quick for whole batches, they are fetched and
transformed all at once, and batches are slices of the result. All else is done sample by sample: in threads,
by numbers that are drawn for each, where reading and transforms are ours, or nothing is drawn; otherwise with
the sample's seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate, get_worker_info

from dist_train.config import UserError
from dist_train.data.batch import Batch, Unreadable
from dist_train.data.geometry import as_batch, stack
from dist_train.data.images import BadSample, as_text
from dist_train.data.labels import Labels, first_wrong, wrong
from dist_train.data.normalize import as_tensor, unit
from dist_train.data.order import Part
from dist_train.data.source import View
from dist_train.data.transforms import ImageTransform, OneHot
from dist_train.nested import map_tensors, tensors
from dist_train.seeds import seed_sample

UNREADABLE = (BadSample, OSError, SyntaxError)  # the latter two are PIL's
MOST_BAD = 100  # in a row: then it isn't the samples
MOST_BAD_GROUPS = 3  # that are lost as a whole, likewise


class Samples(Dataset[Any]):
    """`source` with its transforms; `__getitems__` takes a list of `Part` and returns a `Batch` of each."""

    def __init__(
        self,
        source: Any,
        transform: ImageTransform | None,  # None: the inputs are no images
        labels: Labels,
        seed: int = 0,
        on_bad: str = "stop",  # "stop", "replace" or "leave out"
    ) -> None:
        self.source, self.transform, self.labels = View(source), transform, labels
        self.seed, self.on_bad = seed, on_bad
        self.checked = False  # whether all labels were found to be right
        self.augment: Callable[[Batch], Batch] | None = None  # what is done to its batches on the device

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
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
        if not self.is_batched:
            return [self.batch(part) for part in parts]
        numbers = np.concatenate([part.indices for part in parts])
        inputs, targets = self.source.read_many(torch.from_numpy(numbers))
        targets = self.all_targets(targets, numbers)
        if self.transform is not None and self.is_keyed:
            drawn = [self.drawn(part.epoch, part.indices) for part in parts]
            inputs = self.transform.normalize(self.transform.batch(inputs, np.concatenate(drawn)))
        elif self.transform is not None:
            inputs = self.transform(inputs)
        batches, end = [], 0
        for part in parts:
            rows = itemgetter(slice(end, end := end + len(part.indices)))
            batches.append(Batch(map_tensors(rows, inputs), map_tensors(rows, targets), part))
        return batches

    def batch(self, part: Part) -> Batch:
        """A micro-batch, fetched sample by sample."""
        samples, bad, read = self.samples(part)
        if self.on_bad == "leave out":
            part = part._replace(indices=part.indices[read])
        filled = samples or [self.readable(0, part.epoch)]
        inputs = self.inputs([one for one, _ in filled])
        targets = None
        if any(target is not None for _, target in filled):
            targets = self.numbers(self.collated("a target", [target for _, target in filled]))
        if not samples:
            nothing = itemgetter(slice(0))
            inputs, targets = map_tensors(nothing, inputs), map_tensors(nothing, targets)
        normalize = self.transform.normalize if self.transform is not None and self.is_keyed else None
        return Batch(inputs, targets, part, tuple(bad), normalize)

    def inputs(self, values: list[Any]) -> Any:
        """The inputs of a batch, of those that `prepared` gave."""
        if self.transform is None or not self.is_keyed:
            return self.collated("an input", values)
        if len({image.dtype for image in values}) > 1:  # files of 8 bits and of more
            values = [unit(image) for image in values]
        if len({image.shape for image in values}) > 1:
            self.collated("an input", values)  # which tells it
        return stack(values)

    def collated(self, what: str, values: list[Any]) -> Any:
        """Inputs or targets as one of a batch. Raises UserError for what can't be stacked."""
        shapes = {tuple(tuple(tensor.shape) for tensor in tensors(value)): None for value in values}
        if len(shapes) > 1:
            differing = (pair for pair in zip(*list(shapes)[:2], strict=False) if pair[0] != pair[1])
            one, other = map(list, next(differing, ("some", "none")))
            where, kind, mend = "data", f"{what.split()[-1]}s", "give them one shape"
            if self.transform is not None and what == "an input" and isinstance(values[0], torch.Tensor):
                where, kind = self.transform.where, "images"
                mend = "give them one size, as by {Resize: {size: [64, 64]}}"
            raise UserError(f"{where}: {kind} of shapes {one} and {other} don't fit into one batch; {mend}.")
        try:
            stacked = default_collate(values)
        except TypeError:  # of a kind that it doesn't know
            stacked = None
        if not any(True for _ in tensors(stacked)):
            raise UserError(
                f"data: {what} is of type {type(values[0]).__name__}; make it a number or a tensor"
                f"{', as by data.target_transform' if what == 'a target' else ''}."
            )
        return tuple(stacked) if type(values[0]) is tuple else stacked

    def samples(self, part: Part) -> tuple[list[tuple[Any, Any]], list[tuple[str, str]], np.ndarray]:
        """The samples of a micro-batch, those that can't be read, with the reason, and which can, `[B]`.

        A bad one is replaced by the next one of the data set that can be read, or left out. Raises
        UserError where neither is wanted.
        """
        rows = self.drawn(part.epoch, part.indices) if self.is_keyed else [None] * len(part.indices)
        samples: list[tuple[Any, Any]] = []
        bad: list[tuple[str, str]] = []
        read = np.ones(len(rows), dtype=bool)
        for place, (index, drawn) in enumerate(zip(part.indices.tolist(), rows, strict=True)):
            try:
                samples.append(self.prepared(index, part.epoch, drawn))
            except UNREADABLE as error:
                if self.on_bad == "stop":
                    raise
                read[place] = False
                bad.append(self.unread(index, error))
                if self.on_bad == "replace":
                    after = index + getattr(error, "lost", 1)
                    samples.append(self.readable(after, part.epoch, bad))
        return samples, bad, read

    def readable(self, index: int, epoch: int, bad: list[tuple[str, str]] | None = None) -> tuple[Any, Any]:
        """The first sample from `index` on that can be read; those before it are added to `bad`.

        Where a whole group of samples is lost, goes on beyond it. Raises UserError where too many in a row
        can't be read.
        """
        tried = groups = 0
        while tried < MOST_BAD and groups < MOST_BAD_GROUPS:
            place = index % len(self)
            try:
                return self.prepared(place, epoch)
            except UNREADABLE as error:
                last, lost = str(error), getattr(error, "lost", 1)
                if bad is not None:
                    bad.append(self.unread(place, error))
            index, tried, groups = index + lost, tried + 1, groups + (lost > 1)
        raise UserError(f"{last} Nor could any of the {tried - 1} samples before it be read.")

    def unread(self, index: int, error: Exception) -> tuple[str, str]:
        """What can't be read, a sample or all that lies with it, and why."""
        return getattr(error, "whole", "") or self.name(index), str(error)

    def name(self, index: int) -> str:
        """The path of a sample's file, or its number where there is none."""
        path = self.source.path(index)
        return f"sample {index}" if path is None else as_text(path)

    def sample(self, index: int, epoch: int) -> tuple[Any, Any]:
        """One transformed sample as (image `[C, H, W]` or other input, target), as this epoch sees it."""
        inputs, target = self.prepared(index, epoch)
        if self.transform is not None and self.is_keyed:
            inputs = self.transform.normalize(inputs)
        return inputs, target

    def prepared(self, index: int, epoch: int, drawn: np.ndarray | None = None) -> tuple[Any, Any]:
        """The same before normalization, which is done to a whole batch, where samples are keyed.

        Args:
            drawn: the numbers of this sample, where it is keyed and they are at hand.
        """
        if not (self.is_keyed or self.in_threads):
            seed_sample(self.seed, epoch, index, everything=not self.is_plain)
        image, label = self.pair(index)
        label = self.target(label, index)
        if self.transform is None:
            return image, label
        if self.is_keyed:
            drawn = self.drawn(epoch, np.array([index]))[0] if drawn is None else drawn
            return self.transform.batch(as_batch(as_tensor(image)), drawn[None])[0], label
        if self.transform.steps:
            image, label = _copy(image), _copy(label)
        return self.transform.pair(image, label)

    def pair(self, index: int) -> tuple[Any, Any]:
        """A sample's input and label as the data set gives them; what is no pair is all input."""
        item = self.source[index]
        if isinstance(item, (tuple, list)) and len(item) == 2:
            return item[0], item[1]
        if self.labels.strict or not isinstance(item, (dict, tuple)):
            raise UserError(
                f"data: {self.name(index)} is a {type(item).__name__}, not a pair (image, label)."
            )
        return item, None

    def target(self, label: Any, index: int) -> Any:
        """The target of a sample with this label. Raises UserError, naming it, for one that can't be."""
        if (self.checked and self.labels.transform is None) or (label is None and not self.labels.strict):
            return label
        reason = ""
        if isinstance(self.labels.transform, OneHot):
            reason = wrong(label, self.labels.classes, strict=True)
        if self.labels.transform is not None and not reason:
            label = self.labels.transform(_copy(label))
        if reason := reason or wrong(label, self.labels.classes, self.labels.strict):
            raise UserError(f"data: the label of {self.name(index)} {reason}.")
        return label

    def all_targets(self, labels: Any, numbers: np.ndarray) -> Any:
        """The targets of the samples `numbers`, which have these labels."""
        if isinstance(self.labels.transform, OneHot):  # of labels that were checked at the start
            labels = self.labels.transform(labels)
        elif self.labels.transform is not None:
            rows = [self.target(label, i) for label, i in zip(labels, numbers.tolist(), strict=True)]
            labels = torch.stack([torch.as_tensor(row) for row in rows])
        elif not self.checked and isinstance(labels, torch.Tensor):
            self.refuse(first_wrong(labels, self.labels.classes, self.labels.strict), numbers)
        return self.numbers(labels)

    def numbers(self, targets: Any) -> Any:
        """Class numbers as int64: torch's loss takes no other; all other targets as they are."""
        if self.labels.strict and targets.ndim == 1 and not targets.is_floating_point():
            return targets.long()
        return targets

    def check_labels(self, part: str) -> None:
        """Raises UserError for a wrong one, where the labels of all samples are at hand."""
        by_number = isinstance(self.labels.transform, OneHot)
        if self.labels.transform is not None and not by_number:
            return
        labels = self.source.all_labels()
        if labels is not None:
            self.refuse(first_wrong(labels, self.labels.classes, self.labels.strict or by_number), part=part)
            self.checked = True

    def refuse(
        self, found: tuple[int, str] | None, numbers: np.ndarray | None = None, part: str = ""
    ) -> None:
        """Raises UserError for a wrong label, `found` at a place among the samples `numbers`, or all."""
        if found is not None:
            place, reason = found
            where = f"in the {part} set, " if part else ""
            name = self.name(place if numbers is None else int(numbers[place]))
            raise UserError(f"data: {where}the label of {name} {reason}.")

    def drawn(self, epoch: int, indices: np.ndarray) -> np.ndarray:
        """What is drawn for samples where they are keyed: `ImageTransform.drawn`."""
        assert self.transform is not None
        return self.transform.drawn(self.seed, epoch, indices)

    @property
    def is_keyed(self) -> bool:
        """Whether source and transforms are ours, and numbers drawn ahead say what is done to an image."""
        is_ours = self.source.in_threads or self.source.can_read_many
        return is_ours and self.transform is not None and self.transform.is_keyed

    @property
    def in_threads(self) -> bool:
        """Whether threads may make batches at once: nothing draws from a generator that they share."""
        by_us = self.labels.transform is None or isinstance(self.labels.transform, OneHot)
        return self.source.in_threads and (self.transform is None or self.is_keyed) and by_us

    @property
    def is_batched(self) -> bool:
        """Whether samples are in memory, and their transforms are quick for whole batches."""
        return self.source.can_read_many and (self.transform is None or self.transform.batched)

    @property
    def is_plain(self) -> bool:
        """Whether source and transforms are ours, so that all they draw is torch's."""
        return self.source.can_read_many and (self.transform is None or self.transform.ours)


def _copy(value: Any) -> Any:
    """A copy for a transform: one that works in place must not reach the data set's own."""
    if isinstance(value, (torch.Tensor, dict, tuple, list)):
        return map_tensors(torch.Tensor.clone, value)
    return value.copy() if hasattr(value, "copy") else value
