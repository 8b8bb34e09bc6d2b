"""Fetching: batches are made ahead of time by threads of this process, or by worker processes.

Threads take a tenth of the time to start, share memory, and send nothing; decoders and resizing let go of
Python's lock. What holds it, and what draws from global generators, needs processes.
"""

from __future__ import annotations

import atexit
import ctypes
import json
import multiprocessing
import os
import signal
import sys
import zlib
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader

from dist_train.config import Config, counted
from dist_train.data.ahead import ahead
from dist_train.data.batch import Batch, Unreadable
from dist_train.data.order import Part
from dist_train.data.samples import Samples
from dist_train.nested import map_tensors, tensors
from dist_train.runtime import Runtime, allowed_cpus

PR_SET_PDEATHSIG = 1
FETCH_BYTES = 2**22  # of images in memory that are transformed at a time: they stay in the CPU's cache


class Loader(DataLoader[Batch]):
    """A DataLoader that is asked for several micro-batches at a time, and gives them one by one."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        return chain.from_iterable(super().__iter__())  # type: ignore[arg-type]


class Threads:
    """The batches of a sampler in its order, made by threads a few ahead of time.

    Args:
        at_a_time: how many batches a thread makes at once.
        ahead: how often as many may wait or be in the making.
        pin: whether to copy them into page-locked memory.
    """

    def __init__(
        self, samples: Samples, sampler: Iterable[Part], threads: int, at_a_time: int, ahead: int, pin: bool
    ) -> None:
        self.samples, self.threads, self.ahead, self.pin = samples, threads, ahead, pin
        self.groups: Any = BatchSampler(sampler, at_a_time, drop_last=False)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Batch]:
        yield from chain.from_iterable(ahead(self._made, self.groups, self.threads, self.ahead))

    def _made(self, parts: list[Part]) -> list[Batch]:
        return [self._ready(batch) for batch in self.samples.__getitems__(parts)]

    def _ready(self, batch: Batch | Unreadable) -> Batch:
        assert isinstance(batch, Batch)  # a thread raises what a process would send
        if not self.pin:
            return batch
        inputs, targets = (map_tensors(torch.Tensor.pin_memory, x) for x in (batch.inputs, batch.targets))
        return batch._replace(inputs=inputs, targets=targets)


def workers(samples: Samples, config: Config, runtime: Runtime) -> int:
    """How many threads or processes make the batches; 0: the training itself does, between its steps."""
    if config.data.workers is not None:
        return config.data.workers
    share = allowed_cpus() // runtime.local_world_size
    if samples.is_batched:  # quick, but not for nothing: a CPU that the training leaves alone can do it
        return int(samples.in_threads and share > torch.get_num_threads())
    return min(16, share)


def described(samples: Samples, config: Config, runtime: Runtime) -> str:
    """A line that tells who makes the batches of images, and what needs processes for it; or nothing.

    Of images in memory that are quick for whole batches there is nothing to tell.
    """
    count = workers(samples, config, runtime)
    if not count or samples.transform is None or samples.is_batched:
        return ""
    each = " of each rank" if runtime.world_size > 1 else ""
    if samples.in_threads:
        return f"images: read and transformed in {counted(count, 'thread')}{each}"
    reason = samples.transform.not_keyed or "this data set"
    return f"images: read and transformed in {counted(count, 'worker process')}{each}, as {reason} needs them"


def make_loader(
    samples: Samples, sampler: Iterable[Part], config: Config, runtime: Runtime, batch_bytes: int
) -> Iterable[Batch]:
    """The loader of micro-batches of so many bytes, with workers and page-locked memory where they help."""
    options = config.data
    count = workers(samples, config, runtime)
    pin = runtime.device.type == "cuda" if options.pin_memory is None else options.pin_memory
    pin = pin and torch.cuda.is_available()
    at_a_time = max(1, FETCH_BYTES // batch_bytes) if samples.is_batched else 1
    if count and samples.in_threads:
        return Threads(samples, sampler, count, at_a_time, count * options.prefetch, pin)
    return Loader(
        samples,
        batch_sampler=BatchSampler(sampler, at_a_time, drop_last=False),  # type: ignore[arg-type]
        collate_fn=_as_it_is,  # `__getitems__` returns whole batches
        num_workers=count,
        pin_memory=pin,
        prefetch_factor=options.prefetch if count else None,
        persistent_workers=count > 0,
        worker_init_fn=partial(_start_worker, _ending) if count else None,
    )


def recorded(batches: Iterable[Batch], path: Path) -> Iterator[Batch]:
    """`batches`, each written to `path` as a line: its samples, and checksums of what the model gets."""
    path.parent.mkdir(exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for batch in batches:
            line = {
                "step": batch.part.step + 1,
                "part": batch.part.number,
                "samples": batch.part.indices[: batch.part.size].tolist(),
                "inputs": _checksum(batch.inputs),
                "targets": _checksum(batch.targets),
            }
            file.write(json.dumps(line) + "\n")
            file.flush()
            yield batch


def _checksum(value: Any) -> int:
    """Of the bytes of all tensors in `value`, in their order."""
    number = 0
    for tensor in tensors(value):
        number = zlib.crc32(tensor.cpu().contiguous().numpy().data, number)
    return number


def _as_it_is(batch: Any) -> Any:
    return batch


# Set when this process is about to end. Python then ends its workers by SIGTERM, and waits for them.
_ending = multiprocessing.RawValue("b", 0)
atexit.register(setattr, _ending, "value", 1)


def _start_worker(ending: Any, _: int) -> None:
    """Workers outlive the signals that end a run: the main process stops them when it has saved.

    They don't outlive that process. On Linux they end with it; elsewhere they see after some seconds that it
    was killed, and until then hold its connections open, so that the other ranks don't notice.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def handle(number: int, frame: FrameType | None) -> None:
        if ending.value:
            os._exit(0)

    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), handle if name == "SIGTERM" else signal.SIG_IGN)
