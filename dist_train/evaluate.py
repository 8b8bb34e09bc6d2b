"""Exact evaluation: each sample of the eval set counts once, for any world size and batch size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

from dist_train.config import RunError, UserError
from dist_train.data import Batch
from dist_train.runtime import Runtime
from dist_train.task import Task, measure


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    task: Task,
    runtime: Runtime,
    channels_last: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[dict[str, float], list[tuple[str, str]]]:
    """The means of loss and metrics over the samples of all ranks, as `eval/<name>`; and the samples
    that could not be read and count nowhere, with the reason.

    Sums and counts are added up in float64; nothing is padded and nothing trimmed. If `stop` turns true
    on any rank there are no means. Raises UserError for a task that doesn't give one number for each
    sample, or not always the same ones.

    Args:
        model: the bare model, not its DDP wrapper; left in the mode that it was in.
        batches: this rank's share of the eval set.
    """
    training = model.training
    model.eval()
    for buffer in model.buffers() if runtime.world_size > 1 else ():
        torch.distributed.broadcast(buffer, 0)  # BatchNorm's averages differ from rank to rank
    values: dict[str, list[torch.Tensor]] = {}
    stopped = False
    bad: list[tuple[str, str]] = []
    for batch in batches:
        if stopped := stop():
            break
        inputs, targets, _, unreadable = batch.to(runtime.device, channels_last)
        bad += unreadable
        if not len(targets):  # all of them
            continue
        for name, value in measure(task, model(inputs), targets).items():
            values.setdefault(name, []).append(value)
    model.train(training)
    # One value per sample stays on the device until here, so no batch waits for a result.
    columns = {name: torch.cat(items).double().cpu() for name, items in values.items()}
    mine = {name: (column.sum().item(), len(column)) for name, column in columns.items()}
    ranks = runtime.gather((mine, stopped, bad))
    unread = [item for _, _, items in ranks for item in items]
    if any(stopped for _, stopped, _ in ranks):
        return {}, unread
    some = [sums for sums, _, _ in ranks if sums]  # a rank without samples has none
    if not some:
        first = f" could be read; the first: {unread[0][1]}" if unread else " is there"
        raise RunError(f"data: not one sample of the eval set{first}")
    if any(sums.keys() != some[0].keys() or len({n for _, n in sums.values()}) > 1 for sums in some):
        raise UserError(
            f"task: '{type(task).__name__}' gives some metrics for a part of the batches only; it must give"
            " the same ones each time."
        )
    means = {}
    for name in some[0]:
        parts = [sums[name] for sums in some]
        means[f"eval/{name}"] = math.fsum(p[0] for p in parts) / sum(p[1] for p in parts)
    return means, unread
