"""Exact evaluation: each sample of the eval set counts once, for any world size and batch size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

from dist_train.data import Batch
from dist_train.runtime import Runtime
from dist_train.task import Task


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
    on any rank there are no means.

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
        outputs = model(inputs)
        measured = {"loss": task.loss(outputs, targets), **task.metrics(outputs, targets)}
        for name, value in measured.items():
            values.setdefault(name, []).append(value)
    model.train(training)
    # One value per sample stays on the device until here, so no batch waits for a result.
    columns = {name: torch.cat(items).double().cpu() for name, items in values.items()}
    mine = {name: (column.sum().item(), len(column)) for name, column in columns.items()}
    ranks = runtime.gather((mine, stopped, bad))
    unread = [item for _, _, items in ranks for item in items]
    if any(stopped for _, stopped, _ in ranks):
        return {}, unread
    names = next((list(sums) for sums, _, _ in ranks if sums), [])
    means = {}
    for name in names:
        parts = [sums[name] for sums, _, _ in ranks if sums]  # a rank without samples has none
        means[f"eval/{name}"] = math.fsum(p[0] for p in parts) / sum(p[1] for p in parts)
    return means, unread
