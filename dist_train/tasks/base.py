"""What a task is: how a model's loss comes about, and which sums an evaluation reports.

A task owns the forward pass. Values with weights and sums that add up, not means, are what makes a short last
batch, unequal ranks, ignored pixels and an eval set of any size exact: only what is summed over the whole
global batch or eval set is divided, once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn

from dist_train.config import counted
from dist_train.config.errors import UserError
from dist_train.data import Batch

Losses = (
    tuple[torch.Tensor, torch.Tensor | None]
    | tuple[torch.Tensor, torch.Tensor | None, dict[str, torch.Tensor]]
)


class Task(Protocol):
    """What training and evaluation ask of a task."""

    best: str  # which metric tells the best checkpoint, as "max eval/accuracy"

    def losses(self, model: nn.Module, batch: Batch) -> Losses:
        """The values of the loss `[B, ...]`, and what each of them weighs, of the same shape.

        The loss of a step is sum(values x weights) / sum(weights) over the global batch. Without weights
        there must be one value for each sample, `[B]`, and each weighs 1. Further values by name, of the
        same shape, may follow: their means are recorded as `train/<name>`.
        """
        ...

    def sums(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """Tensors by name, of any shapes, which an evaluation adds up over all batches and ranks.

        Whole numbers are added up exactly in any order; floats should be float64 (float32 on MPS).
        """
        ...

    def report(self, sums: dict[str, torch.Tensor]) -> dict[str, float]:
        """The metrics by name that the sums of a whole eval set mean; `loss` is among them."""
        ...


class SampleTask:
    """A task by one value per sample: give `loss` and, if there are more, `metrics`, and the rest follows."""

    best = "min eval/loss"

    def loss(self, outputs: torch.Tensor, targets: Any) -> torch.Tensor:
        """The loss of each sample, `[B]`; targets are a tensor `[B, ...]` or, as the data has it, several."""
        raise NotImplementedError

    def metrics(self, outputs: torch.Tensor, targets: Any) -> dict[str, torch.Tensor]:
        """Further values of each sample, `[B]` each, whose means are reported by these names."""
        return {}

    def losses(self, model: nn.Module, batch: Batch) -> Losses:
        """The loss of each sample, `[B]`. Raises UserError if `loss` gives anything else."""
        return each_loss(self, model(batch.inputs), batch.targets, batch.rows), None

    def sums(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """The sums of loss and metrics, and how many samples there are."""
        values = measure(self, model(batch.inputs), batch.targets, batch.rows)
        count = torch.tensor(batch.rows)
        return {name: wide(value).sum() for name, value in values.items()} | {"samples": count}

    def report(self, sums: dict[str, torch.Tensor]) -> dict[str, float]:
        """The means over all samples."""
        count = int(sums["samples"])
        return {name: value.item() / count for name, value in sums.items() if name != "samples"}


class Given(SampleTask):
    """Makes a task of an object that has no more than `loss`, `metrics` and `best`."""

    def __init__(self, given: Any) -> None:
        self.given, self.best = given, given.best
        self.loss, self.metrics = given.loss, given.metrics  # type: ignore[method-assign]


def complete(task: Any) -> Task:
    """`task` itself, or what makes a task of an object with `loss`, `metrics` and `best`.

    Raises UserError for an object that is neither.
    """
    if all(hasattr(task, name) for name in ("losses", "sums", "report", "best")):
        return task
    missing = [name for name in ("loss", "metrics", "best") if not hasattr(task, name)]
    if missing:
        raise UserError(
            f"task: {name_of(task)} has no `{missing[0]}`; a task has loss, metrics and best, or losses,"
            " sums, report and best."
        )
    return Given(task)


def wide(values: torch.Tensor) -> torch.Tensor:
    """`values` in float64, so that sums of millions are exact enough; float32 on MPS, which has no more."""
    return values.float() if values.device.type == "mps" else values.double()


# --- what a task by samples gives, checked ------------------------------------------------------------


def each_loss(task: SampleTask, outputs: Any, targets: Any, count: int) -> torch.Tensor:
    """The loss of each of `count` samples, `[B]`. Raises UserError if the task gives anything else."""
    if not isinstance(outputs, torch.Tensor):
        raise UserError(
            f"model: it gives a {type(outputs).__name__}, but a task works with one tensor [B, ...]; give"
            " that out alone."
        )
    return _each_sample(task, "loss", task.loss(outputs, targets), count)


def measure(task: SampleTask, outputs: torch.Tensor, targets: Any, count: int) -> dict[str, torch.Tensor]:
    """Loss and metrics of each of `count` samples, `[B]` each. Raises UserError if a task gives others."""
    measured = {"loss": each_loss(task, outputs, targets, count)}
    metrics = task.metrics(outputs, targets)
    if not isinstance(metrics, Mapping):
        raise UserError(
            f"task: the metrics of {name_of(task)} are a {type(metrics).__name__}, not a dict by name."
        )
    for name, value in metrics.items():
        check_name(task, name)
        measured[name] = _each_sample(task, f"metric '{name}'", value, count)
    return measured


def check_name(task: Any, name: Any) -> None:
    """Raises UserError for what can't be the name of a metric besides the loss."""
    taken = ("loss", "samples")
    if not isinstance(name, str) or name in taken or not name.isprintable() or len(name.split()) != 1:
        raise UserError(
            f"task: {name_of(task)} calls a metric {name!r}; a name is one word, and not 'loss' or 'samples'."
        )


def _each_sample(task: SampleTask, what: str, value: Any, count: int) -> torch.Tensor:
    """`value` if it is one number for each of `count` samples."""
    if isinstance(value, torch.Tensor):
        if value.shape == (count,) and not value.is_complex():
            return value
        if value.ndim == 0 and count == 1:  # the one sample's, squeezed
            return value.reshape(1)
    shown = (
        f"of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
    )
    raise UserError(
        f"task: the {what} of {name_of(task)} is {shown} for {counted(count, 'sample')}, but must be one"
        f' number for each, [{count}]: use reduction="none", and take the mean over all other dimensions.'
    )


def name_of(task: Any) -> str:
    """What messages call a task."""
    return f"'{type(task.given if isinstance(task, Given) else task).__name__}'"
