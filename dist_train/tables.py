"""What an evaluation of a classifier has to show beyond its metrics: classes, confusions, samples."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from dist_train.config import Config, UserError
from dist_train.data import Data, ImageTransform
from dist_train.data.samples import Samples
from dist_train.outcomes import ByClass, Keeping, Outcomes, by_class, confused
from dist_train.tasks import Task, is_classification

MOST_PAIRS = 10_000  # of a class and what its samples are said to be


class Sample(NamedTuple):
    """A sample and what the model says of it."""

    number: int  # in the eval set
    image: np.ndarray  # uint8 [H, W, C]
    label: str
    predicted: str
    probability: float  # of what is predicted
    loss: float


class Tables(NamedTuple):
    """The tables of one evaluation."""

    classes: list[str]
    by_class: ByClass
    confusions: list[tuple[int, int, int]]  # a class, what its samples are said to be, and how often
    samples: list[Sample]


def keeping(config: Config, task: Task, may_be_last: bool) -> Keeping | None:
    """What keeps the outcomes of an evaluation for tables, if there may be any."""
    wanted = config.wandb.tables == "evaluations" or (config.wandb.tables == "end" and may_be_last)
    return Keeping(task) if wanted and config.wandb.mode != "disabled" and is_classification(task) else None


def of(outcomes: Outcomes, data: Data, images: int) -> Tables:
    """The tables of an evaluation's outcomes.

    Args:
        images: so many samples are shown, spread over the eval set, the same ones each time.
    """
    count = max(len(data.classes), 1 + int(max(outcomes.label.max(), outcomes.predicted.max())))
    names = [*map(str, data.classes), *map(str, range(len(data.classes), count))]
    pairs, often = np.unique([outcomes.label, outcomes.predicted], axis=1, return_counts=True)
    confusions = [(int(a), int(b), int(n)) for a, b, n in zip(*pairs, often, strict=True)]
    if len(confusions) > MOST_PAIRS:
        confusions = confused(outcomes.label, outcomes.predicted, MOST_PAIRS)
    places = np.linspace(0, len(outcomes) - 1, min(images, len(outcomes))).round().astype(int)
    samples = (_sample(data.eval, outcomes, place, names) for place in places)
    rows = by_class(outcomes.label, outcomes.predicted, count)
    return Tables(names, rows, confusions, [sample for sample in samples if sample])


def _sample(samples: Samples, outcomes: Outcomes, place: int, names: list[str]) -> Sample | None:
    """One sample; None if it is no image."""
    number = int(outcomes.sample[place])
    try:
        image: Any = ImageTransform()(samples.pair(number)[0])
    except (UserError, TypeError, AttributeError):
        return None
    if image.ndim != 3 or len(image) not in (1, 3, 4):
        return None
    return Sample(
        number,
        (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy(),
        names[outcomes.label[place]],
        names[outcomes.predicted[place]],
        float(outcomes.probability[place, 0]),
        float(outcomes.loss[place]),
    )
