"""What a model learns: the loss and the metrics, as one value per sample.

A task is any object with the methods of `Task`. Values per sample, not means, are what makes a short last
batch, unequal ranks and an eval set of any size exact: the loop sums them and divides by the count.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn

from dist_train.config import Config, construct, import_object, nearest
from dist_train.config.errors import UserError


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
