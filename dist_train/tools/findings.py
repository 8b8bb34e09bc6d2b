"""What a run's model says of its eval set, and what lies in its data: collected for a report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch.utils.data import Subset

from dist_train import data
from dist_train import outcomes as said
from dist_train.config import RunError, UserError, completed, from_file
from dist_train.data import ImageTransform
from dist_train.data.samples import UNREADABLE, Samples
from dist_train.data.source import View
from dist_train.outcomes import Keeping, Outcomes
from dist_train.pages.pictures import Picture
from dist_train.predict import Evaluation, evaluation
from dist_train.tools import evaluation as saving
from dist_train.tools.inspect_data import Looked, leaks, look, twins
from dist_train.tools.pictures import visible

MOST_MEASURED = 10_000  # samples that a report measures by itself, unless all are asked for
PICTURES = 24  # of the worst, and of the most doubtful
MOST_TOLD = 50  # leaks and twins whose names are told


@dataclass
class Findings:
    """What was found; what could not be is told in `left_out`."""

    left_out: list[str] = field(default_factory=list)
    outcomes: Outcomes | None = None
    of: str = ""  # of which samples, by which checkpoint
    classes: list[str] = field(default_factory=list)  # the names of all that may be in `outcomes`
    known: int = 0  # how many of them are the data's: spare outputs follow
    worst: list[Picture] = field(default_factory=list)
    doubtful: list[Picture] = field(default_factory=list)
    train: Looked | None = None
    eval: Looked | None = None
    leaks: list[tuple[str, str]] = field(default_factory=list)  # names of (training, eval) samples: the first
    leaked: int = 0  # eval samples that are in the training set
    twins: list[tuple[str, str]] = field(default_factory=list)  # (names, classes) of samples of equal pixels
    conflicts: list[str] = field(default_factory=list)  # the names of those whose labels differ
    twinned: int = 0  # training samples that repeat another


def collect(run: Path, overrides: Sequence[str], trust: bool, everything: bool) -> Findings:
    """Measures the run's best checkpoint, or takes what `eval --save` has saved, and looks at the data.

    Args:
        everything: measures all of the eval set, and looks at all images, however many there are.
    """
    found = Findings()
    try:
        with evaluation(run, overrides, trust) as ready:
            sets = ready.sets
            _look(found, sets, everything)
            _measure(found, ready, overrides, everything)
    except (UserError, RunError, OSError) as error:
        found.left_out.append(f"What the model says: {error}")
        _do_without(found, run, overrides, trust, everything)
    return found


def _do_without(found: Findings, run: Path, overrides: Sequence[str], trust: bool, everything: bool) -> None:
    """Where nothing can be measured: what was saved of the newest evaluation, and the data alone."""
    if found.train is None:
        try:
            needed = ["data.", "task.", "seed", "train.batch_size"]
            config = from_file(completed(run / "config.yaml"), run, overrides, needed=needed, trust=trust)
            _look(found, data.build(config), everything)
        except (UserError, OSError) as error:
            found.left_out.append(f"The data: {error}")
    folders = sorted(run.glob("evaluations/*/outcomes.npz"), key=lambda path: path.stat().st_mtime)
    if found.outcomes is not None or not folders:
        return
    try:
        found.outcomes, notes, _ = saving.read(folders[-1].parent)
    except UserError as error:
        found.left_out.append(f"What was saved: {error}")
        return
    found.known = len(notes["classes"])
    found.classes = saving.class_names(notes["classes"], found.outcomes)
    found.of = f"{len(found.outcomes):,} samples, as saved in {folders[-1].parent.name}"


# --- the model -------------------------------------------------------------------------------------------


def _measure(found: Findings, ready: Evaluation, overrides: Sequence[str], everything: bool) -> None:
    samples, checkpoint = ready.sets.eval, ready.path.resolve().stem
    keeping = Keeping(ready.task)
    folder = saving.folder_of(ready, overrides)
    if (folder / "outcomes.npz").is_file():
        found.outcomes = saving.read(folder)[0]
        found.of = (
            f"{len(found.outcomes):,} samples of the eval set by {checkpoint}, as saved in {folder.name}"
        )
    else:
        if len(samples) > MOST_MEASURED and not everything:
            samples = spread(samples, MOST_MEASURED)
        ready.of(samples).measure(keeping)
        found.outcomes = keeping.gathered(ready.ranks)
        every = (
            "" if len(samples) == len(ready.sets.eval) else f", evenly spread over {len(ready.sets.eval):,}"
        )
        found.of = f"{len(found.outcomes):,} samples of the eval set{every}, by {checkpoint}"
    found.classes = saving.class_names(ready.saved["classes"], found.outcomes)
    if samples.transform is None:
        return
    if int(found.outcomes.sample.max(initial=0)) >= len(samples):
        found.left_out.append("Pictures: the eval set is smaller than when its evaluation was saved.")
        return
    found.worst = _pictures(found, samples, said.worst(found.outcomes, PICTURES))
    found.doubtful = _pictures(found, samples, said.doubtful(found.outcomes, PICTURES))


def spread(samples: Samples, most: int) -> Samples:
    """At most so many of the samples, evenly spread over the set."""
    chosen, view = copy(samples), samples.source
    places = np.arange(0, len(samples), -(-len(samples) // most))
    whole = places if view.positions is None else view.positions[places]
    chosen.source = View(Subset(view.whole, whole.tolist()))
    return chosen


def _pictures(found: Findings, samples: Samples, places: Iterable[int]) -> list[Picture]:
    """The images of some samples as they are read, with their class and what the model says."""
    outcomes, plain = found.outcomes, ImageTransform()
    assert outcomes is not None
    pictures = []
    for place in places:
        index = int(outcomes.sample[place])
        try:
            image = plain(samples.pair(index)[0])
        except UNREADABLE:
            continue
        own = found.classes[outcomes.label[place]]
        shares = [
            f"{found.classes[number]} {share:.0%}"
            for number, share in zip(outcomes.ranked[place], outcomes.probability[place], strict=True)
        ]
        hint = f"{samples.name(index)}\nloss {outcomes.loss[place]:.4g}\n{', '.join(shares)}"
        pixels = visible([(image, "")])[0].numpy()
        likely = [told for told in shares[:2] if not told.endswith(" 0%")]
        pictures.append(Picture(pixels, own, " or ".join(likely), hint))
    return pictures


# --- the data --------------------------------------------------------------------------------------------


def _look(found: Findings, sets: data.Data, everything: bool) -> None:
    """Looks at both sets, and for images that are there twice or in both."""
    found.train, found.eval = (look(samples, everything) for samples in (sets.train, sets.eval))
    found.classes, found.known = found.classes or sets.classes, len(sets.classes)
    both = leaks(found.train, found.eval)
    found.leaked = len(both)
    found.leaks = [(sets.train.name(one), sets.eval.name(other)) for one, other in both[:MOST_TOLD]]
    groups = twins(found.train)
    found.twinned = sum(len(group) - 1 for group in groups)
    labels = found.train.labels
    for group in groups[:MOST_TOLD]:
        own = dict.fromkeys(_name(found.classes, labels, n) for n in group) if labels is not None else {}
        names = ", ".join(sets.train.name(n) for n in group)
        found.twins.append((names, ", ".join(own)))
        if len(own) > 1:
            found.conflicts.append(names)


def _name(classes: Sequence[str], labels: np.ndarray, sample: int) -> str:
    label = int(labels[sample])
    return classes[label] if label < len(classes) else str(label)
