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
) -> dict[str, float]:
    """The means of loss and metrics over the samples of all ranks, as `eval/<name>`.

    Sums and counts are added up in float64; nothing is padded and nothing trimmed. If `stop` turns true
    on any rank the result is empty.

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
    for batch in batches:
        if stopped := stop():
            break
        inputs, targets, _ = batch.to(runtime.device, channels_last)
        outputs = model(inputs)
        measured = {"loss": task.loss(outputs, targets), **task.metrics(outputs, targets)}
        for name, value in measured.items():
            values.setdefault(name, []).append(value)
    model.train(training)
    # One value per sample stays on the device until here, so no batch waits for a result.
    columns = {name: torch.cat(items).double().cpu() for name, items in values.items()}
    mine = {name: (column.sum().item(), len(column)) for name, column in columns.items()}
    ranks = runtime.gather((mine, stopped))
    if any(stopped for _, stopped in ranks):
        return {}
    names = next((list(sums) for sums, _ in ranks if sums), [])
    means = {}
    for name in names:
        parts = [sums[name] for sums, _ in ranks if sums]  # a rank without samples has none
        means[f"eval/{name}"] = math.fsum(p[0] for p in parts) / sum(p[1] for p in parts)
    return means
