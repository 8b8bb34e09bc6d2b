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
        loss: cross_entropy; or bce, for each class whether it is there: the mean of their binary
            cross-entropies, by which ResNets (Wightman et al., 2021) and ViTs (DeiT III, Touvron et al.,
            2022) learn mixed images.
        threshold: with bce, classes of a greater share in a mixed image are there, all others are not.
    """

    best = "max eval/accuracy"

    def __init__(
        self, label_smoothing: float = 0.0, loss: str = "cross_entropy", threshold: float | None = None
    ) -> None:
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be from 0 to below 1, not {label_smoothing}")
        if loss not in ("cross_entropy", "bce"):
            raise ValueError(f"loss is cross_entropy or bce, not {loss!r}")
        if threshold is not None and not (loss == "bce" and 0 <= threshold < 1):
            raise ValueError(f"threshold goes with loss=bce, from 0 to below 1, not {threshold}")
        self.label_smoothing, self.by_class, self.threshold = label_smoothing, loss == "bce", threshold

    def loss(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The loss `[B]` of logits `[B, K]` and class numbers `[B]` or probabilities `[B, K]`."""
        if self.by_class:
            return self._binary(outputs, targets)
        return nn.functional.cross_entropy(
            outputs, targets, reduction="none", label_smoothing=self.label_smoothing
        )

    def _binary(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        classes = outputs.shape[1]
        if targets.ndim == 1:
            targets = nn.functional.one_hot(targets, classes)
        shares = targets * (1 - self.label_smoothing) + self.label_smoothing / classes
        if self.threshold is not None:
            shares = shares > self.threshold
        each = nn.functional.binary_cross_entropy_with_logits(
            outputs, shares.to(outputs.dtype), reduction="none"
        )
        return each.mean(1)

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
