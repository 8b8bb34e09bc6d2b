"""Semantic segmentation: one class for each pixel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from dist_train.config.errors import UserError
from dist_train.data.batch import Batch
from dist_train.tasks.base import wide


class Segmentation:
    """Cross-entropy over all pixels, with the mean intersection over union and the share of right pixels.

    Targets are class numbers `[B, H, W]`. The model gives scores `[B, K, H, W]`, or as torchvision's do a
    dict with these as `out`, and perhaps with those of an auxiliary head as `aux`.

    Args:
        ignore_index: pixels of this number count nowhere.
        class_weights: what a pixel of each class weighs in the loss; 1 each, if not given.
        aux_weight: what the loss of the auxiliary head weighs, in training.
    """

    best = "max eval/miou"

    def __init__(
        self,
        ignore_index: int = 255,
        class_weights: Sequence[float] | None = None,
        aux_weight: float = 0.5,
    ) -> None:
        if class_weights is not None and not all(weight >= 0 for weight in class_weights):
            raise ValueError(f"class_weights must not be below 0: {list(class_weights)}")
        self.ignore_index, self.aux_weight = ignore_index, aux_weight
        self.class_weights = None if class_weights is None else torch.tensor(class_weights).float()

    def losses(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of each pixel and its weight, `[B, H, W]`; an ignored one weighs nothing."""
        outputs = model(batch.inputs)
        values = self._losses(scores(outputs), batch.targets)
        if isinstance(outputs, dict) and "aux" in outputs:
            values = values + self.aux_weight * self._losses(outputs["aux"], batch.targets)
        return values, self._weights(batch.targets, values.dtype)

    def sums(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """The confusion matrix int64 `[K, K]` (row: true class), the loss and the weight of all pixels."""
        outputs, targets = scores(model(batch.inputs)), batch.targets
        values, weights = wide(self._losses(outputs, targets)), wide(self._weights(targets, torch.float32))
        classes = outputs.shape[1]
        cells = classes * targets + outputs.argmax(1)
        cells = torch.where(targets == self.ignore_index, classes**2, cells)
        counts = torch.bincount(cells.flatten(), minlength=classes**2 + 1)[:-1]
        return {
            "confusion": counts.view(classes, classes),
            "loss": (values * weights).sum(),
            "weight": weights.sum(),
        }

    def report(self, sums: dict[str, torch.Tensor]) -> dict[str, float]:
        """The loss, the mean intersection over union of the classes that are there or were predicted, and
        the share of pixels that are right.
        """
        confusion = sums["confusion"].double()
        right = confusion.diagonal()
        union = confusion.sum(0) + confusion.sum(1) - right
        return {
            "loss": (sums["loss"] / sums["weight"]).item(),
            "miou": (right / union)[union > 0].mean().item(),
            "pixel_accuracy": (right.sum() / confusion.sum()).item(),
        }

    def _losses(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Cross-entropy `[B, H, W]`. Raises UserError where outputs and masks don't fit."""
        if not isinstance(targets, torch.Tensor) or targets.ndim != 3 or targets.is_floating_point():
            raise UserError(
                "task: segmentation needs the class of each pixel, [B, H, W] whole numbers, as targets; take"
                " data.name=image_masks, or give them as torchvision.tv_tensors.Mask."
            )
        if outputs.shape[-2:] != targets.shape[-2:]:
            raise UserError(
                f"model: it gives outputs of {list(outputs.shape[-2:])} pixels for masks of"
                f" {list(targets.shape[-2:])}; let it scale them up."
            )
        try:
            return nn.functional.cross_entropy(
                outputs, targets, ignore_index=self.ignore_index, reduction="none"
            )
        except IndexError as error:  # only the CPU says it in time
            raise UserError(
                f"data: a mask has a class that is none of the model's {outputs.shape[1]}: {error}"
            ) from None

    def _weights(self, targets: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        kept = targets != self.ignore_index
        if self.class_weights is None:
            return kept.to(dtype)
        return self.class_weights.to(targets.device, dtype)[targets * kept] * kept


def scores(outputs: object) -> torch.Tensor:
    """The scores `[B, K, H, W]` that a model gives. Raises UserError for anything else."""
    if isinstance(outputs, dict):
        outputs = outputs.get("out")
    if not isinstance(outputs, torch.Tensor) or outputs.ndim != 4:
        shown = list(outputs.shape) if isinstance(outputs, torch.Tensor) else f"a {type(outputs).__name__}"
        raise UserError(
            f"model: it gives {shown}, but segmentation needs a score of each class for each pixel,"
            " [B, K, H, W], such as unet or torchvision's lraspp_mobilenet_v3_large give."
        )
    return outputs
