"""Fetching: a data set as the DataLoader sees it, asked for several micro-batches at a time.

Where samples are in memory and no transform is random, they are fetched and transformed all at once, and
batches are slices of the result; all else is done sample by sample, with the sample's own seed.
"""

from __future__ import annotations

import atexit
import json
import multiprocessing
import os
import signal
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, Subset, default_collate, get_worker_info

from dist_train.config import Config, UserError
from dist_train.data.images import BadSample, InMemory
from dist_train.data.order import Part
from dist_train.data.transforms import ImageTransform, seed_sample
from dist_train.runtime import Runtime, allowed_cpus

UNREADABLE = (BadSample, OSError, SyntaxError)  # the latter two are PIL's
FETCH_BYTES = 2**22  # of images in memory that are transformed at a time: they stay in the CPU's cache
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
    ) -> None:
        self.source, self.transform, self.target_transform = source, transform, target_transform
        self.seed, self.on_bad = seed, on_bad

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
        if self.target_transform is not None:
            targets = torch.stack([torch.as_tensor(self.target_transform(t)) for t in targets])
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
        inputs, targets = default_collate(samples or [self.readable(0, part.epoch)])
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
        return str(source.path(index)) if hasattr(source, "path") else f"sample {index}"

    def sample(self, index: int, epoch: int) -> tuple[torch.Tensor, Any]:
        """One transformed sample as (image `[C, H, W]`, target), as this epoch sees it."""
        seed_sample(self.seed, epoch, index, everything=not self.is_plain)
        image, label = self.source[index]
        if self.target_transform is not None:
            label = self.target_transform(label)
        return self.transform(image), label

    @property
    def is_batched(self) -> bool:
        """Whether samples are in memory, and their transforms take whole batches and are not random."""
        return self.transform.batched and in_memory(self.source) is not None

    @property
    def is_plain(self) -> bool:
        """Whether source and transforms are ours, so that all they draw is torch's."""
        return self.transform.ours and in_memory(self.source) is not None


def in_memory(source: Any) -> InMemory | None:
    """The data set in memory behind `source`, if there is one."""
    base = source.dataset if isinstance(source, Subset) else source
    return base if type(base) is InMemory else None


class Loader(DataLoader[Batch]):
    """A DataLoader that is asked for several micro-batches at a time, and gives them one by one."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        return chain.from_iterable(super().__iter__())  # type: ignore[arg-type]


def make_loader(
    samples: Samples, sampler: Iterable[Part], config: Config, runtime: Runtime, batch_bytes: int
) -> Loader:
    """The loader of micro-batches of so many bytes, with workers and page-locked memory where they help."""
    options = config.data
    workers = options.workers
    if workers is None:
        workers = 0 if samples.is_batched else min(16, allowed_cpus() // runtime.local_world_size)
    pin = runtime.device.type == "cuda" if options.pin_memory is None else options.pin_memory
    at_a_time = max(1, FETCH_BYTES // batch_bytes) if samples.is_batched else 1
    return Loader(
        samples,
        batch_sampler=BatchSampler(sampler, at_a_time, drop_last=False),  # type: ignore[arg-type]
        collate_fn=_as_it_is,  # `__getitems__` returns whole batches
        num_workers=workers,
        pin_memory=pin and torch.cuda.is_available(),
        prefetch_factor=options.prefetch if workers else None,
        persistent_workers=workers > 0,
        worker_init_fn=partial(_start_worker, _ending) if workers else None,
    )


def recorded(batches: Iterable[Batch], path: Path) -> Iterator[Batch]:
    """`batches`, each written to `path` as a line: its samples, and checksums of what the model gets."""
    path.parent.mkdir(exist_ok=True)
    with path.open("w") as file:
        for batch in batches:
            line = {
                "step": batch.part.step + 1,
                "samples": batch.part.indices[: batch.part.size].tolist(),
                "inputs": zlib.crc32(batch.inputs.contiguous().numpy().data),
                "targets": zlib.crc32(batch.targets.contiguous().numpy().data),
            }
            file.write(json.dumps(line) + "\n")
            file.flush()
            yield batch


def _as_it_is(batch: Any) -> Any:
    return batch


# Set when this process is about to end. Python then ends its workers by SIGTERM, and waits for them.
_ending = multiprocessing.RawValue("b", 0)
atexit.register(setattr, _ending, "value", 1)


def _start_worker(ending: Any, _: int) -> None:
    """Workers outlive the signals that end a run: the main process stops them when it has saved."""

    def handle(number: int, frame: FrameType | None) -> None:
        if ending.value:
            os._exit(0)

    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), handle if name == "SIGTERM" else signal.SIG_IGN)
