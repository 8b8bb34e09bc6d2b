"""Labels: what a class number may be, so that a wrong one is told before it is an index deep in torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dist_train.config import UserError

MOST_CLASSES = 1_000_000  # whole numbers beyond it are no class numbers


@dataclass(frozen=True)
class Labels:
    """What the labels of a data set may be, and what is done to each."""

    classes: int  # how many there are; 0: unknown
    strict: bool  # whether targets must be classes: see `wrong`
    transform: Callable[[Any], Any] | None = None


def numbered(labels: Iterable[int], where: str) -> list[str]:
    """The names of classes that have none: 0, 1, ... to the greatest label.

    Raises UserError for a label that can hardly be one.
    """
    count = max(labels, default=-1) + 1
    if count > MOST_CLASSES:
        raise UserError(f"{where}: a label is {count - 1:,}; are these the numbers of classes?")
    return [str(number) for number in range(count)]


def wrong(target: Any, classes: int, strict: bool) -> str:
    """What is wrong with the target of a sample, or nothing.

    Args:
        classes: how many there are; 0: unknown.
        strict: whether it must be a class number or, as floats `[K]`, the classes' probabilities. To a task
            of the user's own a target may mean something else, but no number beyond the classes.
    """
    if isinstance(target, (torch.Tensor, np.ndarray)):
        target = torch.as_tensor(target)
        whole = target.ndim == 0 and not target.is_floating_point()
    else:
        whole = isinstance(target, (int, np.integer, np.bool_))
    if whole:
        number = int(target)
        if (classes and number >= classes) or (strict and number < 0):
            return f"is {number}, but the {f'{classes} ' if classes else ''}classes are numbered from 0"
        return ""
    if not strict:
        return ""
    if not isinstance(target, torch.Tensor):
        return f"is {str(target)[:40]!r} ({type(target).__name__}), not the whole number of a class"
    shape = list(target.shape)
    if not shape:
        return f"is the fraction {float(target):g}, not the whole number of a class"
    if not target.is_floating_point():
        mend = "labels[:, 0]" if shape == [1] else "labels.argmax(1)"
        return f"has the shape {shape}, but is to be one whole number, as by {mend}"
    if len(shape) != 1 or (classes and shape != [classes]):
        return f"has the shape {shape}, not a number for each of the {classes} classes"
    return ""


def first_wrong(labels: torch.Tensor, classes: int, strict: bool) -> tuple[int, str] | None:
    """The place of the first wrong one among the targets `[N, ...]` of all samples, and what is wrong."""
    places = [0]  # for all but numbers it is the shape or the type, which all have
    if labels.ndim == 1 and not labels.is_floating_point():
        outside = (labels >= (classes or torch.inf)) | (labels < (0 if strict else -torch.inf))
        places = outside.nonzero().flatten()[:1].tolist()
    for place in places:
        if reason := wrong(labels[place], classes, strict):
            return place, reason
    return None
