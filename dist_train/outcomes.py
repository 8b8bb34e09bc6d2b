"""What a classifier says of each sample of a set, and what follows: classes, confusions, calibration.

`Keeping` collects it in an evaluation. All else takes arrays and gives arrays. Of N samples and K classes no
table N x K is held: of each sample only the classes that are most probable, and its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from dist_train.config import UserError
from dist_train.data import Batch
from dist_train.runtime import Runtime
from dist_train.tasks import Task, is_classification
from dist_train.tasks.base import each_loss, name_of

TOP = 3  # classes that are kept of each sample
# Samples for which room is made at once: small tensors that stay between large ones that go would keep the
# heap from being used again, which costs some MB a batch.
ROOM = 2**16
BINS = 15  # of a reliability curve, as Guo et al. have it


@dataclass(frozen=True)
class Outcomes:
    """What a model says of N samples, in the order of the set."""

    sample: np.ndarray  # int64 [N], its number in the set
    label: np.ndarray  # int64 [N]
    ranked: np.ndarray  # int64 [N, T], the most probable classes; the first one is what is predicted
    probability: np.ndarray  # float32 [N, T], of these by softmax, as `predict` gives them
    of_label: np.ndarray  # float32 [N], the probability of the label
    loss: np.ndarray  # float32 [N], the task's

    def __len__(self) -> int:
        return len(self.sample)

    @property
    def predicted(self) -> np.ndarray:
        """The most probable class of each, int64 `[N]`."""
        return self.ranked[:, 0]

    @property
    def right(self) -> np.ndarray:
        """Whether each prediction is the label, bool `[N]`."""
        return self.predicted == self.label

    @property
    def margin(self) -> np.ndarray:
        """By how much the most probable class leads over the second, from 0 to 1, float32 `[N]`."""
        second = self.probability[:, 1] if self.probability.shape[1] > 1 else 0
        return self.probability[:, 0] - second


class Keeping:
    """A classification that keeps what the model says of the samples that it evaluates, as they come.

    Raises UserError for any other task.
    """

    def __init__(self, task: Task) -> None:
        if not is_classification(task):
            raise UserError(
                f"task: {name_of(task)} is no classification, so there are no predictions by class, no table"
                " of classes, no confusion matrix and no calibration."
            )
        self.task, self.best = task, task.best
        self.kept: list[tuple[torch.Tensor, torch.Tensor]] = []  # whole numbers and others, [ROOM, ...] each
        self.count = 0  # of samples, in all of these

    def losses(self, model: nn.Module, batch: Batch) -> Any:
        """The task's."""
        return self.task.losses(model, batch)

    def report(self, sums: dict[str, torch.Tensor]) -> dict[str, float]:
        """The task's."""
        return self.task.report(sums)

    def sums(self, model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """The task's, of one forward pass, whose outputs are kept in short; nothing waits for the device."""
        given: list[torch.Tensor] = []

        def remembering(inputs: Any) -> torch.Tensor:
            given.append(model(inputs))
            return given[-1]

        sums = self.task.sums(remembering, batch)  # type: ignore[arg-type]
        self._keep(*_in_short(self.task, given[-1], batch))
        return sums

    def _keep(self, whole: torch.Tensor, real: torch.Tensor) -> None:
        while len(whole):
            filled = self.count % ROOM
            if not filled:
                self.kept.append((whole.new_empty(ROOM, whole.shape[1]), real.new_empty(ROOM, real.shape[1])))
            for room, rows in zip(self.kept[-1], (whole, real), strict=True):
                room[filled : filled + len(rows)] = rows[: ROOM - filled]
            self.count += min(len(whole), ROOM - filled)
            whole, real = whole[ROOM - filled :], real[ROOM - filled :]

    def gathered(self, ranks: Runtime) -> Outcomes:
        """All ranks' samples in their order, each once, on each rank: the same for any number of ranks."""
        mine = None
        if self.kept:
            mine = [torch.cat(parts)[: self.count].cpu().numpy() for parts in zip(*self.kept, strict=True)]
        whole, real = map(np.concatenate, zip(*filter(None, ranks.gather(mine)), strict=True))
        first = np.unique(whole[:, 0], return_index=True)[1]  # a batch that only fills in repeats some
        whole, real = whole[first], real[first]
        return Outcomes(whole[:, 0], whole[:, 1], whole[:, 2:], real[:, 2:], real[:, 0], real[:, 1])


def _in_short(task: Any, outputs: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Of scores `[B, K]`: number, label and ranked classes `[B, 2 + T]`; the label's probability, the loss
    and the probabilities of the ranked ones `[B, 2 + T]`.
    """
    losses = each_loss(task, outputs, batch.targets, batch.rows).float()
    labels = batch.targets.argmax(1) if batch.targets.ndim == 2 else batch.targets
    # Stable: of equal scores the first class leads, as argmax has it.
    ranked = outputs.sort(dim=1, descending=True, stable=True).indices[:, :TOP]
    probabilities = outputs.float().softmax(1)
    of_label = probabilities.gather(1, labels[:, None])
    numbers = torch.from_numpy(batch.part.indices).to(labels.device, non_blocking=True)
    whole = torch.cat([numbers[:, None], labels[:, None], ranked], dim=1)
    return whole, torch.cat([of_label, losses[:, None], probabilities.gather(1, ranked)], dim=1)


# --- by class ------------------------------------------------------------------------------------------


class ByClass(NamedTuple):
    """Of each of K classes; NaN where there is nothing to divide by."""

    samples: np.ndarray  # int64 [K], of the class
    predicted: np.ndarray  # int64 [K], samples that are said to be of it
    right: np.ndarray  # int64 [K], samples for which both are true
    recall: np.ndarray  # float64 [K], right / samples: the accuracy on the class
    precision: np.ndarray  # float64 [K], right / predicted
    f1: np.ndarray  # float64 [K], 2 right / (samples + predicted)


def by_class(label: np.ndarray, predicted: np.ndarray, classes: int) -> ByClass:
    """How well each class is told, by labels and predictions `[N]` below `classes`."""
    count = np.bincount(label, minlength=classes)
    said = np.bincount(predicted, minlength=classes)
    right = np.bincount(label[label == predicted], minlength=classes)
    with np.errstate(invalid="ignore"):
        return ByClass(count, said, right, right / count, right / said, 2 * right / (count + said))


def confusion(label: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """How many samples of each class (row) are said to be of each (column), int64 `[K, K]`."""
    return np.bincount(label * classes + predicted, minlength=classes**2).reshape(classes, classes)


def confused(label: np.ndarray, predicted: np.ndarray, most: int = 10) -> list[tuple[int, int, int]]:
    """The commonest mistakes as (class, said to be, how often), the commonest first."""
    wrong = label != predicted
    pairs, counts = np.unique(np.stack([label[wrong], predicted[wrong]]), axis=1, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:most]
    return [(int(pairs[0, n]), int(pairs[1, n]), int(counts[n])) for n in order]


# --- calibration ---------------------------------------------------------------------------------------


class Reliability(NamedTuple):
    """How often predictions are right that are made with about the same confidence."""

    samples: np.ndarray  # int64 [B], predictions in each of B bins of equal width from 0 to 1
    confidence: np.ndarray  # float64 [B], the mean in each; NaN in an empty one
    accuracy: np.ndarray  # float64 [B]
    error: float  # expected calibration error, from 0 to 1; NaN without samples


def reliability(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> Reliability:
    """The reliability curve and the expected calibration error of predictions `[N]` (Guo et al., 2017).

    A confidence on the border of two bins is in the lower one. One that is NaN is in none.
    """
    finite = np.isfinite(confidence)
    confidence, right = confidence[finite].astype(np.float64), right[finite]
    place = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(place, confidence, bins) / count
        accuracy = np.bincount(place, right, bins) / count
    if not len(confidence):
        return Reliability(count, mean, accuracy, float("nan"))
    error = np.nansum(count * np.abs(accuracy - mean)) / len(confidence)
    return Reliability(count, mean, accuracy, float(error))


# --- samples -------------------------------------------------------------------------------------------


def worst(outcomes: Outcomes, most: int) -> np.ndarray:
    """The places of the samples with the greatest loss, the worst first; a loss that is NaN is the worst."""
    return np.argsort(-np.nan_to_num(outcomes.loss, nan=np.inf), kind="stable")[:most]


def doubtful(outcomes: Outcomes, most: int) -> np.ndarray:
    """The places of the samples whose two most probable classes are closest, the closest first."""
    return np.argsort(outcomes.margin, kind="stable")[:most]


class Slice(NamedTuple):
    """The samples that have one value of something."""

    value: str
    samples: int
    accuracy: float
    loss: float


def slices(values: Sequence[str], outcomes: Outcomes) -> list[Slice]:
    """Accuracy and loss by the values `[N]` of the samples, in the order of the values."""
    names, place = np.unique(np.asarray(values, dtype=str), return_inverse=True)
    count = np.bincount(place, minlength=len(names))
    accuracy = np.bincount(place, outcomes.right, len(names)) / count
    loss = np.bincount(place, outcomes.loss, len(names)) / count
    columns = (names.tolist(), count.tolist(), accuracy.tolist(), loss.tolist())
    return [Slice(*row) for row in zip(*columns, strict=True)]
