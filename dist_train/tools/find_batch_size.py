"""`dist-train find-batch-size`: how many samples of a job a process can train at once.

On a GPU sizes are tried until one doesn't fit. On a CPU nothing is ever filled up, since a system without
memory kills whom it likes: the greatest memory of small batches tells what a sample takes, and the largest
batch follows from it.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path

import numpy as np
import psutil
import torch
from torch.nn.parameter import is_lazy

from dist_train import data, runtime
from dist_train.config import Config, UserError
from dist_train.data.order import Part
from dist_train.models import pretrained
from dist_train.nested import map_tensors
from dist_train.runtime import Runtime
from dist_train.tools.dryrun import DryRun
from dist_train.tools.estimate import replicated
from dist_train.tools.summary import without_memory

SHARE = 0.9  # of the memory that is there, to be used; allocators don't fill all of it
FIRST = 2  # samples: of one, BatchNorm can't tell a deviation
GROWTH = 64e6  # bytes by which a doubled batch must exceed the one before, to tell what a sample takes
TOO_SMALL = "find-batch-size: not even one sample fits into the memory of this device."
SECONDS = 20  # that a step on a CPU may take before no larger one is tried


@dataclass(frozen=True)
class Tried:
    """A batch of one process that was trained."""

    size: int
    gb: float  # the greatest memory so far
    seconds: float  # of a step


@dataclass(frozen=True)
class Found:
    """How large a batch of one process may be, and what was tried to find it."""

    size: int
    tried: list[Tried]
    reason: str


def find_batch_size(config: Config) -> Found:
    """The largest batch of one process, up to the whole training set; leaves no run.

    Raises UserError if the job can't be trained, or if there are several processes.
    """
    ranks = runtime.start(config)
    try:
        if ranks.world_size > 1:
            raise UserError("find-batch-size: start it as one process; what it finds holds for each of many.")
        sets = data.build(pretrained.with_own_transforms(config))
        own, free = _memory(ranks)
        limit = (own + free) * SHARE
        _check_room(config, sets, limit - own)
        most = len(sets.train)
        if ranks.device.type == "cuda":
            try:
                job = DryRun(config, ranks, sets)
            except torch.cuda.OutOfMemoryError:
                raise UserError(TOO_SMALL) from None
            return by_trying(lambda size: _on_gpu(job, ranks, size), most)
        job = DryRun(config, ranks, sets)
        return by_growth(lambda size: _train(job, ranks, size), most, limit / 1e9)
    finally:
        runtime.stop(ranks.accelerator)


def _memory(ranks: Runtime) -> tuple[float, float]:
    """The bytes that this process has of the memory that it trains in, and those that are free."""
    if ranks.device.type == "cuda":
        return 0.0, torch.cuda.mem_get_info(ranks.device)[0]
    return psutil.Process().memory_info().rss, min(psutil.virtual_memory().available, cgroup_left())


def _check_room(config: Config, sets: data.Data, room: float) -> None:
    """Raises UserError where not even what a model takes without any sample fits into so many bytes."""
    model = without_memory(config, sets)
    if any(map(is_lazy, model.parameters())):  # their sizes come with the first batch
        return
    needed = sum(filter(None, replicated(config, model).values()))
    if needed > room:
        raise UserError(
            f"find-batch-size: the model, its gradients and its optimizer take {needed / 1e9:.3g} GB, and"
            f" {max(0, room) / 1e9:.3g} GB may be used; `dist-train estimate` tells what each takes."
        )


def by_trying(train: Callable[[int], Tried | None], most: int) -> Found:
    """The largest size that can be trained: doubled until `train` gives None, then halved in between."""
    tried: list[Tried] = []
    good, bad = 0, most + 1
    while good < most and bad - good > max(1, good // 16):
        size = min(2 * good or FIRST, most) if bad > most else (good + bad) // 2
        try:
            found = train(size)
        except ValueError as error:
            if size > 1:
                raise
            raise UserError(
                f"find-batch-size: {FIRST} samples don't fit into the memory of this device, and the model"
                f" can't be trained on one: {str(error).rstrip('.')}."
            ) from None
        if found is None:
            bad = size
        else:
            tried.append(found)
            good = size
    if not good:
        raise UserError(TOO_SMALL)
    reason = "the whole training set" if good == most else f"{bad:,} did not fit"
    return Found(good, tried, reason)


def by_growth(train: Callable[[int], Tried], most: int, limit: float) -> Found:
    """The largest size by what a sample takes, told by sizes that stay far below `limit` (GB)."""
    tried = [train(min(FIRST, most))]
    while tried[-1].size < most:
        last = tried[-1]
        grown = last.gb - tried[-2].gb if len(tried) > 1 else 0.0
        before = tried[-2].gb - tried[-3].gb if len(tried) > 2 else 0.0
        # The first growths may hide in what the process took while it started.
        if before > GROWTH / 8e9 and grown > GROWTH / 1e9:
            break
        if last.gb + 4 * grown > limit / 2 or last.seconds > SECONDS:
            break
        tried.append(train(min(2 * last.size, most)))
    last = tried[-1]
    if last.gb > limit:  # of the first one, as the others are stopped at half of it
        raise UserError(f"find-batch-size: {last.size} samples take {last.gb:.2f} of {limit:.2f} GB.")
    if last.size == most:
        return Found(most, tried, "the whole training set")
    each = (last.gb - tried[-2].gb) / (last.size - tried[-2].size) if len(tried) > 1 else 0.0
    if each <= 0:
        reason = f"larger ones were not tried: a step took {last.seconds:.0f} s, in {last.gb:.2f} GB"
        return Found(last.size, tried, reason)
    size = last.size + math.floor((limit - last.gb) / each)
    if size < 1:
        raise UserError(f"find-batch-size: {FIRST} samples take {tried[0].gb:.2f} of {limit:.2f} GB.")
    reason = f"a sample takes {1e3 * each:.3g} MB, and {limit:.3g} GB may be used"
    return Found(min(size, most), tried, reason)


def _train(job: DryRun, ranks: Runtime, size: int) -> Tried:
    """Two steps on batches of so many samples, all of them copies of two; the second one is timed."""
    batch = _batch(job, ranks, size)
    for _ in range(2):
        begin = time.perf_counter()
        job.learner.train_step(_parts(job, batch), 0.0)
        if ranks.device.type == "cuda":
            torch.cuda.synchronize(ranks.device)
        seconds = time.perf_counter() - begin
    return Tried(size, ranks.memory()["perf/memory_gb"], seconds)


def _on_gpu(job: DryRun, ranks: Runtime, size: int) -> Tried | None:
    """The same on a GPU, its memory emptied before; None where it doesn't fit."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(ranks.device)
    try:
        coming = _batch(job, ranks, size)  # while one is computed, the next one lies there
        found = _train(job, ranks, size)
        del coming
        return found
    except torch.cuda.OutOfMemoryError:
        job.learner.optimizer.zero_grad()
        job.learner.parallel.forget()
        return None


def _batch(job: DryRun, ranks: Runtime, size: int) -> data.Batch:
    """The first sample of the training set, so many times, on the device."""
    first, rows = data.first_batch(job.sets.train), torch.arange(size) % 2
    inputs, targets = (map_tensors(itemgetter(rows), item) for item in (first.inputs, first.targets))
    part = Part(0, 0, np.zeros(size, np.int64), size, size * job.learner.per_rank)
    return data.Batch(inputs, targets, part).to(ranks.device, job.learner.config.channels_last)


def _parts(job: DryRun, batch: data.Batch) -> Iterator[data.Batch]:
    """A step of as many such parts as the job's have."""
    for number in range(job.learner.per_rank):
        yield batch._replace(part=batch.part._replace(number=number))


def cgroup_left(top: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """The bytes that the control groups of this process leave it (version 2); infinity without a limit."""
    left = math.inf
    try:
        path = own.read_text(encoding="utf-8").strip().splitlines()[-1].partition("::")[2].strip("/")
    except (OSError, IndexError):
        path = ""
    for folder in (top / path, *(top / path).parents):
        if not folder.is_relative_to(top):
            break
        try:
            most, used = (int((folder / f"memory.{name}").read_text("utf-8")) for name in ("max", "current"))
            stat = dict(map(str.split, (folder / "memory.stat").read_text("utf-8").splitlines()))
            left = min(left, most - used + int(stat["inactive_file"]))  # copies of files make way
        except (OSError, ValueError, LookupError):  # no such group, or "max": no limit
            continue
    return left


def told(found: Found, config: Config) -> list[str]:
    """What was tried, and the answer, line by line."""
    lines = ["samples   GB      seconds  samples/s"]
    for each in found.tried:
        lines.append(
            f"{each.size:<8,}  {each.gb:<6.3g}  {each.seconds:<7.3g}  {each.size / each.seconds:,.0f}"
        )
    power = 2 ** int(math.log2(found.size))
    parts = config.train.accumulate
    lines.append(f"\nlargest: {found.size:,} samples for each process ({found.reason})")
    more = f", times {parts} by train.accumulate" if parts > 1 else ""
    lines.append(f"train.batch_size={power * parts} has the largest power of two{more}; times the processes")
    return lines
