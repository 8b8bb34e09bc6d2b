"""A task is tried before the first step, so that what would come up in mid-run is said at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from operator import itemgetter
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from dist_train.config import UserError
from dist_train.data.batch import Batch
from dist_train.nested import map_tensors, tensors
from dist_train.tasks.base import SampleTask, Task, check_name, each_loss, measure, name_of
from dist_train.tasks.classification import is_classification

REFUSALS = (
    RuntimeError,
    ValueError,
    IndexError,
    AssertionError,
)  # what shapes that don't fit make torch raise


def check(
    task: Task, model: nn.Module, batch: Batch, outputs: torch.Tensor | None, classes: int
) -> list[str]:
    """The names of the loss and the metrics of a task, which is tried on some samples.

    Args:
        model: on the device of `batch`; left as it is.
        batch: some samples of the set.
        outputs: of the model for as many samples, perhaps others, `[B, ...]`: for a task by samples.
        classes: how many there are, or 0.

    Raises UserError for what would come up only in training, or in the first evaluation.
    """
    given = getattr(task, "given", task)
    for module in (given, *vars(given).values()) if hasattr(given, "__dict__") else ():
        if isinstance(module, nn.Module) and any(weight.requires_grad for weight in module.parameters()):
            raise UserError(
                f"task: {name_of(task)} has weights of its own, which would be neither trained nor saved;"
                " make them a part of the model, or freeze them by requires_grad_(False)."
            )
    if isinstance(task, SampleTask) and outputs is not None:
        names = _check_samples(task, outputs, batch.targets, classes)
        if type(task).losses is not SampleTask.losses:  # as with a teacher, whose scores must fit, too
            with torch.no_grad():
                task.losses(lambda inputs: outputs, batch)  # type: ignore[arg-type]
        return names
    try:
        with undisturbed(model):
            with torch.enable_grad():
                values, weights = task.losses(model, batch)[:2]
            with torch.no_grad():
                metrics = task.report({name: value.cpu() for name, value in task.sums(model, batch).items()})
    except REFUSALS as error:
        raise UserError(
            f"task: {name_of(task)} and the model can't take a batch of these samples: {_reason(error)}."
        ) from error
    if not isinstance(values, torch.Tensor) or not values.requires_grad:
        raise UserError(f"task: the loss of {name_of(task)} has no gradient by the model's weights.")
    shape = values.shape if weights is None else weights.shape
    count = (batch.part.size,)
    if shape != values.shape or (values.shape if weights is None else values.shape[:1]) != count:
        raise UserError(
            f"task: {name_of(task)} gives losses {list(values.shape)}"
            + (f" and weights {list(weights.shape)}" if weights is not None else " without weights")
            + f" for {batch.part.size} samples; give one value for each sample, [B],"
            " or values [B, ...] with a weight for each."
        )
    if "loss" not in metrics:
        raise UserError(f"task: what {name_of(task)} reports has no 'loss'.")
    for name in metrics.keys() - {"loss"}:
        check_name(task, name)
    return list(metrics)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """In evaluation mode, and with the mode and buffers of before at the end."""
    training = model.training
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if not is_lazy(buffer)}
    model.eval()  # leaves BatchNorm's averages alone
    try:
        yield
    finally:
        model.train(training)
        for name, buffer in model.named_buffers():
            if name in before:
                buffer.data.copy_(before[name])


def _check_samples(task: SampleTask, outputs: torch.Tensor, targets: Any, classes: int) -> list[str]:
    if is_classification(task) and (outputs.ndim != 2 or outputs.shape[1] < classes):
        raise UserError(
            f"model: it gives outputs of shape {list(outputs.shape[1:])} for an image, but classification"
            f" needs one for each {f'of the {classes} classes' if classes else 'class'}."
        )
    if is_classification(task) and not isinstance(targets, torch.Tensor):
        raise UserError(
            f"task: classification needs one label for each image, not a {type(targets).__name__}; take it"
            " out by data.target_transform, or write a task of your own."
        )
    # As many rows as no other dimension has: a sum over the samples can't pass for a value of each.
    count = next(
        n for n in range(5, 99) if n not in {n for t in (outputs, *tensors(targets)) for n in t.shape[1:]}
    )
    rows = torch.arange(count) % len(outputs)
    outputs, targets = outputs.detach()[rows], map_tensors(itemgetter(rows), targets)
    try:
        with torch.enable_grad():  # copies: a task may work in place
            given = outputs.clone().requires_grad_(outputs.is_floating_point())
            tried = each_loss(task, given.clone(), map_tensors(torch.clone, targets), count)
        with torch.no_grad():  # as in an evaluation
            measured = measure(task, outputs, targets, count)
    except REFUSALS as error:
        raise UserError(
            f"task: {name_of(task)} can't take outputs {_shown(outputs)} and targets {_shown(targets)}:"
            f" {_reason(error)}."
        ) from error
    if not tried.requires_grad:
        raise UserError(f"task: the loss of {name_of(task)} has no gradient by the model's outputs.")
    return list(measured)


def _shown(value: Any) -> str:
    return " and ".join(f"{list(tensor.shape)} of {tensor.dtype}" for tensor in tensors(value))


def _reason(error: Any) -> str:
    return " ".join(str(error).split()).rstrip(".")
