"""Exact evaluation: each sample of the eval set counts once, for any world size and batch size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import nn

from dist_train.config import RunError, UserError
from dist_train.data import Batch
from dist_train.runtime import Runtime
from dist_train.tasks import Task
from dist_train.tasks.base import name_of

Unread = list[tuple[str, str]]  # samples that could not be read, and why


class Sums(NamedTuple):
    """What one rank has measured, on the CPU."""

    floats: dict[str, torch.Tensor]  # of each batch: [batches, ...]
    whole: dict[str, torch.Tensor]  # of all batches: whole numbers add up exactly in any order
    names: set[frozenset[str]]  # of the sums that a batch gave
    stopped: bool
    unread: Unread


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    task: Task,
    ranks: Runtime,
    stop: Callable[[], bool] = lambda: False,
    filler: Batch | None = None,
) -> tuple[dict[str, float], Unread]:
    """What the task reports of the sums over all ranks' batches, as `eval/<name>`; and the samples that
    could not be read and count nowhere, with the reason.

    Nothing is padded and nothing trimmed. If `stop` turns true on any rank there are no metrics. Raises
    UserError for a task that doesn't always give the same sums.

    Args:
        model: the bare model, not its DDP wrapper; left in the mode that it was in.
        batches: this rank's share of the eval set, on the device.
        filler: for a model that ranks compute together: what a rank computes, and counts nowhere, while
            others have more batches.
    """
    training = model.training
    model.eval()
    together = _alone(batches, stop) if filler is None else _in_step(batches, filler, ranks, stop)
    mine = _measure(model, together, task, filler)
    model.train(training)
    gathered = ranks.gather(mine)
    unread = [item for each in gathered for item in each.unread]
    if any(each.stopped for each in gathered):
        return {}, unread
    names = {name for each in gathered for name in each.names}
    if not names:
        first = f" could be read; the first: {unread[0][1]}" if unread else " is there"
        raise RunError(f"data: not one sample of the eval set{first}")
    if len(names) > 1:
        raise UserError(
            f"task: {name_of(task)} gives some metrics for a part of the batches only; it must give the same"
            " ones each time."
        )
    total = {}
    for name in dict.fromkeys(name for each in gathered for name in [*each.floats, *each.whole]):
        some = [each.floats[name] for each in gathered if name in each.floats]  # a rank may have no batch
        numbers = [each.whole[name] for each in gathered if name in each.whole]
        total[name] = _sum(torch.cat(some)) if some else torch.stack(numbers).sum(0)
    return {f"eval/{name}": value for name, value in task.report(total).items()}, unread


@torch.no_grad()
def _measure(model: nn.Module, batches: Iterable[Batch | None], task: Task, filler: Batch | None) -> Sums:
    """What this rank's batches give, up to the first None, which asks to stop."""
    floats: dict[str, list[torch.Tensor]] = {}
    whole: dict[str, torch.Tensor] = {}
    names: set[frozenset[str]] = set()
    unread: Unread = []
    stopped = False
    for batch in batches:
        if stopped := batch is None:
            break
        assert batch is not None
        if batch is not filler:
            unread += batch.bad
        if batch is filler or not batch.rows:  # without rows none of it could be read
            if filler:
                task.sums(model, filler)
            continue
        sums = task.sums(model, batch)
        names.add(frozenset(sums))
        for name, value in sums.items():
            if value.is_floating_point():
                floats.setdefault(name, []).append(value)
            else:
                whole[name] = whole[name] + value if name in whole else value
    # What a batch gives stays on the device until here, so no batch waits for a result.
    columns = {name: torch.stack(values).cpu().double() for name, values in floats.items()}
    return Sums(columns, {name: value.cpu() for name, value in whole.items()}, names, stopped, unread)


def _alone(batches: Iterable[Batch], stop: Callable[[], bool]) -> Iterator[Batch | None]:
    """This rank's batches; None ends them ahead of their end."""
    for batch in batches:
        yield None if stop() else batch


def _in_step(
    batches: Iterable[Batch], filler: Batch, ranks: Runtime, stop: Callable[[], bool]
) -> Iterator[Batch | None]:
    """As many batches on each rank, the last ones the `filler`; None on all when one is asked to stop."""
    own = iter(batches)
    while True:
        batch = next(own, None)
        asked = torch.tensor([batch is not None, stop()], dtype=torch.float32, device=ranks.device)
        more, stopped = ranks.sum(asked).tolist()
        if stopped:
            yield None
        if not more:
            return
        yield filler if batch is None else batch


def _sum(column: torch.Tensor) -> torch.Tensor:
    """The sum over batches `[N, ...]`; of single numbers the exact one, rounded once."""
    if column.ndim > 1:
        return column.sum(0)
    return torch.tensor(math.fsum(column.tolist()), dtype=torch.float64)
