"""What a step did, as it is taken from the learner and from what followed its modules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import torch
from torch import nn

from dist_train.data import Batch, Data
from dist_train.learner import Learner, Step
from dist_train.nested import map_tensors
from dist_train.tasks import is_classification, wide
from dist_train.tools.trace import Call, Fault, Statistics, Trace
from dist_train.tree import tree_sum

MOST_NUMBERS = 100  # of a target that is shown
MOST_CLASSES = 4  # in a mixture that is shown by their names


@dataclass(frozen=True)
class Seen:
    """A sample of the step as the model saw it."""

    rank: int
    sample: int
    path: str
    label: str
    loss: float
    image: torch.Tensor | None  # [C, H, W]; None where inputs are no images
    part: int = 0  # of the global batch
    prediction: str = ""  # the class of the highest score; "" where there are no classes
    probability: float = math.nan  # that the model gives to it


@dataclass(frozen=True)
class Layer:
    """A module with trained weights of its own."""

    name: str
    kind: str
    gradient: float  # its norm, before clipping
    weights: float  # their norm, before the step


@dataclass(frozen=True)
class Replayed:
    """What a step did."""

    start: str  # what it was rebuilt from
    samples: list[Seen]
    loss: float  # mean over the global batch
    gradients: dict[str, float]  # norm of the gradient of each weight, before clipping
    layers: list[Layer] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)  # of each part the first number that is not finite
    broken: list[str] = field(default_factory=list)  # weights that are not finite after the step
    activations: dict[str, tuple[str, Statistics]] = field(default_factory=dict)  # by module: type, numbers


def weight_norms(model: nn.Module) -> dict[str, float]:
    """The norm of each weight."""
    return {name: float(torch.linalg.vector_norm(w.detach())) for name, w in model.named_parameters()}


def gradient_norms(learner: Learner, done: Step) -> dict[str, float]:
    """The norm of the gradient of each trained weight in a step, as training has it."""
    trained = set(map(id, learner.parallel.weights))
    names = [name for name, weight in learner.model.named_parameters() if id(weight) in trained]
    norms = [float(torch.linalg.vector_norm(rows)) for rows in done.row_norms]
    return dict(zip(names, norms, strict=True))


def replayed(
    sets: Data, learner: Learner, batches: Sequence[Batch], done: Step, trace: Trace, per_rank: int
) -> Replayed:
    """What a step did, but for its start and the norms of weights before it.

    Args:
        per_rank: how many of the parts one rank of the run computed.
    """
    samples = []
    for batch, (values, weights) in zip(batches, done.losses, strict=True):
        outputs = trace.outputs.get(batch.part.number) if is_classification(learner.task) else None
        guesses = _guesses(outputs, sets.classes)
        samples += _seen(sets, batch, each_sample(values, weights).tolist(), guesses, per_rank)
    weight, summed = tree_sum([wide(sums) for sums in done.sums])[:2].tolist()
    after = weight_norms(learner.model)
    return Replayed(
        start="",
        samples=samples,
        loss=summed / weight if weight else math.nan,
        gradients=gradient_norms(learner, done),
        faults=trace.faults,
        broken=[name for name, norm in after.items() if not math.isfinite(norm)],
        activations=_activations(trace.kept),
    )


def layers(model: nn.Module, gradients: dict[str, float], weights: dict[str, float]) -> list[Layer]:
    """The modules that own trained weights, in the model's order, with the norms over all of these."""
    owned: dict[str, list[str]] = {}
    for name in gradients:
        owned.setdefault(name.rpartition(".")[0], []).append(name)
    return [
        Layer(
            module,
            type(model.get_submodule(module)).__name__,
            math.hypot(*(gradients[name] for name in names)),
            math.hypot(*(weights[name] for name in names)),
        )
        for module, names in owned.items()
    ]


def each_sample(values: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """The loss of each sample `[B]`; 0 where nothing of it weighs anything."""
    if weights is None:
        return values
    total = weights.reshape(len(weights), -1).sum(1)
    summed = (values * weights).reshape(len(weights), -1).sum(1)
    return torch.where(total > 0, summed / total, 0)


def _seen(
    sets: Data, batch: Batch, losses: list[float], guesses: list[tuple[str, float]], per_rank: int
) -> list[Seen]:
    seen = []
    for place, index in enumerate(batch.part.indices[: batch.part.size].tolist()):
        inputs = map_tensors(itemgetter(place), batch.inputs)
        is_image = sets.train.transform is not None and isinstance(inputs, torch.Tensor)
        seen.append(
            Seen(
                rank=batch.part.number // per_rank,
                sample=index,
                path=sets.known(index).get("path", ""),
                label=_label(map_tensors(itemgetter(place), batch.targets), sets.classes),
                loss=losses[place],
                image=inputs if is_image else None,
                part=batch.part.number,
                prediction=guesses[place][0] if guesses else "",
                probability=guesses[place][1] if guesses else math.nan,
            )
        )
    return seen


def _guesses(outputs: torch.Tensor | None, classes: list[str]) -> list[tuple[str, float]]:
    """Of scores `[B, K]` the class of the highest one, and its probability; nothing without classes."""
    if outputs is None or outputs.shape[1] < len(classes) or not classes:
        return []
    best = outputs.softmax(1).max(1)
    return [
        (classes[number] if number < len(classes) and math.isfinite(share) else "", share)
        for share, number in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def _label(target: Any, classes: list[str]) -> str:
    """A target in a word: the name of a class, numbers, or nothing for what is too long."""
    if not isinstance(target, torch.Tensor):
        return ""
    if classes and target.ndim == 0:
        return classes[int(target)]
    if target.is_floating_point() and target.shape == (len(classes),):  # a class, or a mixture of them
        parts = [(share, name) for share, name in zip(target.tolist(), classes, strict=True) if share]
        if len(parts) <= MOST_CLASSES:
            return " + ".join(name if share == 1 else f"{share:.2g} {name}" for share, name in parts)
    if target.numel() > MOST_NUMBERS:
        return ""
    return str(target.tolist())


def _activations(calls: Sequence[Call]) -> dict[str, tuple[str, Statistics]]:
    """What each module gave, over all parts and calls."""
    found: dict[str, tuple[str, Statistics]] = {}
    for call in calls:
        assert call.statistics
        kind, sum_ = found.get(call.name, (call.kind, Statistics()))
        found[call.name] = kind, sum_ + call.statistics
    return found
