"""What a model learns: the loss and the metrics, as one value per sample.

A task is any object with the methods of `Task`. Values per sample, not means, are what makes a short last
batch, unequal ranks and an eval set of any size exact: the loop sums them and divides by the count.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn

from dist_train.config import Config, construct, import_object, nearest
from dist_train.config.errors import UserError
from dist_train.progress import counted


class Task(Protocol):
    """What the loop asks of a task."""

    best: str  # which metric tells the best checkpoint, as "max eval/accuracy"

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The loss of each sample, `[B]`."""
        ...

    def metrics(self, outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        """Further values of each sample, `[B]` each, whose means are reported by these names."""
        ...


class Classification:
    """Cross-entropy over classes, with accuracy, and top-5 accuracy where there are more than 10 classes.

    Args:
        label_smoothing: share of the target spread over all classes (Szegedy et al., 2016).
    """

    best = "max eval/accuracy"

    def __init__(self, label_smoothing: float = 0.0) -> None:
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be from 0 to below 1, not {label_smoothing}")
        self.label_smoothing = label_smoothing

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Cross-entropy `[B]` of logits `[B, K]` and class numbers `[B]` or probabilities `[B, K]`."""
        return nn.functional.cross_entropy(
            outputs, targets, reduction="none", label_smoothing=self.label_smoothing
        )

    def metrics(self, outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        """1 or 0 for each sample: whether its class is the first, or among the first five."""
        labels = targets.argmax(1) if targets.ndim == 2 else targets
        hits = {"accuracy": (outputs.argmax(1) == labels).float()}
        if outputs.shape[1] > 10:
            hits["top5"] = (outputs.topk(5, dim=1).indices == labels[:, None]).any(1).float()
        return hits


def build(config: Config) -> Task:
    """The task that the configuration names."""
    name = config.task.name
    if name == "classification":
        return construct(Classification, config.task.args, "task.args")
    if ":" not in name:
        near = nearest(name, ["classification"])
        raise UserError(f"task.name: there is no task '{name}'{near}; use package.module:object.")
    return construct(import_object(name, "task.name"), config.task.args, "task.args")


# --- what a task gives, checked -----------------------------------------------------------------------


def is_classification(task: Task) -> bool:
    """Whether the model's outputs are scores of classes: the metrics are those of `Classification`."""
    return getattr(type(task), "metrics", None) is Classification.metrics


def losses(task: Task, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The loss of each sample, `[B]`. Raises UserError if the task gives anything else."""
    if not isinstance(outputs, torch.Tensor):
        raise UserError(
            f"model: it gives a {type(outputs).__name__}, but a task works with one tensor [B, ...]; give"
            " that out alone."
        )
    return _each_sample(task, "loss", task.loss(outputs, targets), len(targets))


def measure(task: Task, outputs: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """Loss and metrics of each sample, `[B]` each. Raises UserError if the task gives anything else."""
    measured = {"loss": losses(task, outputs, targets)}
    metrics = task.metrics(outputs, targets)
    if not isinstance(metrics, Mapping):
        raise UserError(
            f"task: the metrics of {_name(task)} are a {type(metrics).__name__}, not a dict by name."
        )
    for name, value in metrics.items():
        if not isinstance(name, str) or name == "loss" or not name.isprintable() or len(name.split()) != 1:
            raise UserError(
                f"task: {_name(task)} calls a metric {name!r}; a name is one word, and not 'loss'."
            )
        measured[name] = _each_sample(task, f"metric '{name}'", value, len(targets))
    return measured


def _each_sample(task: Task, what: str, value: Any, count: int) -> torch.Tensor:
    """`value` if it is one number for each of `count` samples."""
    if isinstance(value, torch.Tensor):
        if value.shape == (count,) and not value.is_complex():
            return value
        if value.ndim == 0 and count == 1:  # the one sample's, squeezed
            return value.reshape(1)
    told = f"of shape {list(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
    raise UserError(
        f"task: the {what} of {_name(task)} is {told} for {counted(count, 'sample')}, but must be one"
        f' number for each, [{count}]: use reduction="none", and take the mean over all other dimensions.'
    )


def check(task: Task, outputs: torch.Tensor, targets: torch.Tensor, classes: int) -> list[str]:
    """The names of the loss and the metrics of a task, which is tried on some outputs and targets.

    Args:
        outputs: of a model, for some samples `[B, ...]`.
        targets: of as many samples, perhaps others, `[B, ...]`.
        classes: how many there are, or 0.

    Raises UserError for what would come up only in training, or in the first evaluation.
    """
    missing = [name for name in ("loss", "metrics", "best") if not hasattr(task, name)]
    if missing:
        raise UserError(f"task: {_name(task)} has no `{missing[0]}`; a task has loss, metrics and best.")
    for module in (task, *vars(task).values()) if hasattr(task, "__dict__") else ():
        if isinstance(module, nn.Module) and any(weight.requires_grad for weight in module.parameters()):
            raise UserError(
                f"task: {_name(task)} has weights of its own, which would be neither trained nor saved; make"
                " them a part of the model, or freeze them by requires_grad_(False)."
            )
    if is_classification(task) and (outputs.ndim != 2 or outputs.shape[1] < classes):
        raise UserError(
            f"model: it gives outputs of shape {list(outputs.shape[1:])} for an image, but classification"
            f" needs one for each {f'of the {classes} classes' if classes else 'class'}."
        )
    # As many rows as no other dimension has: a sum over the samples can't pass for a value of each.
    count = next(n for n in range(5, 99) if n not in {*outputs.shape[1:], *targets.shape[1:]})
    rows = torch.arange(count) % len(outputs)
    outputs, targets = outputs.detach()[rows], targets[rows]
    try:
        with torch.enable_grad():  # copies: a task may work in place
            given = outputs.clone().requires_grad_(outputs.is_floating_point())
            tried = losses(task, given.clone(), targets.clone())
        with torch.no_grad():  # as in an evaluation
            measured = measure(task, outputs, targets)
    except (RuntimeError, ValueError, IndexError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(
            f"task: {_name(task)} can't take outputs {list(outputs.shape)} of {outputs.dtype} and targets"
            f" {list(targets.shape)} of {targets.dtype}: {reason}."
        ) from error
    if not tried.requires_grad:
        raise UserError(f"task: the loss of {_name(task)} has no gradient by the model's outputs.")
    return list(measured)


def _name(task: Task) -> str:
    return f"'{type(task).__name__}'"
