"""Language modelling: which symbol follows, at each place of a sequence."""

from __future__ import annotations

import math

import torch
from torch import nn

from dist_train.data.batch import Batch
from dist_train.tasks.base import wide

IGNORED = -100  # a target that counts nowhere, as in torch's cross-entropy


class Language:
    """Cross-entropy of the symbol that follows each place `[B, T]`; a target of -100 counts nowhere.

    Reports loss (nats for each target), perplexity (its exponential), bits_per_byte (a target is a byte) and
    accuracy (how often the most probable symbol follows): of sums over all targets, so a set of any length
    is measured exactly.
    """

    best = "min eval/loss"

    def losses(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The nats of each target `[B, T]`, and 1 or 0: whether it counts."""
        values = _nats(model(batch.inputs), batch.targets)
        return values, (batch.targets != IGNORED).to(values.dtype)

    def sums(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """Nats of all targets, how many these are, and how many of them were the most probable symbol."""
        scores = model(batch.inputs)
        return {
            "nats": wide(_nats(scores, batch.targets)).sum(),
            "targets": (batch.targets != IGNORED).sum(),
            "correct": (scores.argmax(-1) == batch.targets).sum(),
        }

    def report(self, sums: dict[str, torch.Tensor]) -> dict[str, float]:
        """What the sums of a whole set mean."""
        loss, count = float(sums["nats"]) / int(sums["targets"]), int(sums["targets"])
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),  # a float ends there
            "bits_per_byte": loss / math.log(2),
            "accuracy": int(sums["correct"]) / count,
        }


def _nats(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log of the probability `[B, T]` that scores `[B, T, K]` give to the targets; 0 for an ignored one."""
    flat = nn.functional.cross_entropy(
        scores.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return flat.view_as(targets)
