"""Classification: one class for each image."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dist_train.tasks.base import SampleTask


class Classification(SampleTask):
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


def is_classification(task: Any) -> bool:
    """Whether the model's outputs are scores of classes: the metrics are those of `Classification`."""
    return getattr(type(task), "metrics", None) is Classification.metrics
