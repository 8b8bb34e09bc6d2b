"""`dist-train report`: all that is known of a run on one page, and in short on a terminal.

The record (recorded.py) is always there; what the model says of its eval set and what lies in the data
(findings.py) only where checkpoint and data are, and the page says what is left out.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dist_train import __version__
from dist_train import outcomes as said
from dist_train.checkpoint.files import write_output
from dist_train.config import counted, printable
from dist_train.pages.page import Curve, Html, chart, figure, grid, page, section, table, text, tiles, warning
from dist_train.pages.pictures import gallery, matrix
from dist_train.tools import pictures, recorded
from dist_train.tools.evaluation import MOST_CLASSES
from dist_train.tools.findings import Findings, collect
from dist_train.tools.inspect_data import Looked
from dist_train.tools.recorded import Recorded

MOST_CELLS = 40  # classes of a confusion matrix whose cells are told one by one
FEW = 12  # classes of one that has room beside a table
MOST_CONFUSED = 10


def report(
    run: Path,
    output: Path,
    overrides: Sequence[str] = (),
    *,
    everything: bool = False,
    trust: bool = False,
) -> None:
    """Writes the page, and prints it in short.

    Args:
        overrides: `key=value` changes for the evaluation, as for `eval`.
        everything: whether all images are measured and looked at, however many there are.
        trust: whether the run's files may name any object, which is imported and called.

    Raises UserError if there is no such run, or the page can't be written.
    """
    record = Recorded.read(run)
    found = collect(run, overrides, trust, everything)
    write_output(output, build(record, found).encode())
    show(record, found)
    print(f"written: {output}")


def build(record: Recorded, found: Findings) -> str:
    """The page."""
    sections = [
        section("Overview", recorded.overview(record), *map(warning, troubles(record, found))),
        recorded.curves(record),
        *_outcomes(found),
        *_data(found),
        recorded.time(record),
        recorded.setting(record),
    ]
    lead = f"A run of dist_train, as its folder tells it. Made by dist-train {__version__} report."
    return page(record.folder.resolve().name, *sections, lead=lead)


def troubles(record: Recorded, found: Findings) -> Iterator[str]:
    """What is wrong, a sentence for each: with the run, with the data, with the report."""
    status = record.status
    if status.get("state") in ("failed", "lost"):
        reason = status.get("trouble") or status.get("reason") or "no reason is known"
        yield f"The run is {status['state']}: {reason}"
    elif status.get("trouble"):
        yield f"The last trouble: {status['trouble']}"
    if bad := status.get("bad_samples"):
        yield f"{counted(bad, 'sample')} could not be read: {record.folder}/bad_samples.jsonl lists them."
    if skipped := status.get("skipped_steps"):
        yield f"{counted(skipped, 'step')} had no finite loss and were skipped."
    if found.leaked and found.eval:
        first = "; ".join(f"{one} = {other}" for one, other in found.leaks[:3])
        yield (
            f"A leak: {found.leaked:,} of {found.eval.seen:,} eval samples have the very pixels of a training"
            f" sample ({first}{'; ...' if found.leaked > 3 else ''}), so the eval set shows too much."
        )
    if found.conflicts:
        yield f"The same pixels under two labels in the training set: {'; '.join(found.conflicts[:3])}."
    for sentence in found.left_out:
        yield f"Left out. {sentence}"


# --- what the model says ---------------------------------------------------------------------------------


def _outcomes(found: Findings) -> Iterator[Html]:
    outcomes, names = found.outcomes, found.classes
    if outcomes is None:
        return
    count = max(outcomes.label.max(initial=0), outcomes.predicted.max(initial=0)) + 1
    count = max(count, found.known)
    rows = said.by_class(outcomes.label, outcomes.predicted, count)
    figures = ((name, *(_number(column[n]) for column in rows)) for n, name in enumerate(names[:count]))
    head = ("class", "samples", "predicted", "right", "recall", "precision", "F1")
    confusions = list(_confusions(found, count))
    if count <= FEW:
        confusions = [grid(*confusions)]
    yield section("Classes", text(found.of), table(head, figures), *confusions)
    curve = said.reliability(outcomes.probability[:, 0], outcomes.right)
    yield section("Calibration", *_calibration(curve, outcomes))
    if found.worst:
        yield section(
            "Samples",
            gallery(
                "The worst: the greatest loss", found.worst, "Above its class, below what the model says."
            ),
            gallery("The most doubtful: two classes nearly alike", found.doubtful),
        )


def _confusions(found: Findings, count: int) -> Iterator[Html]:
    outcomes, names = found.outcomes, found.classes
    assert outcomes is not None
    if count <= MOST_CLASSES:
        counts = said.confusion(outcomes.label, outcomes.predicted, count)
        caption = "Rows are classes, columns what they are said to be."
        if count <= MOST_CELLS:
            yield matrix("Confusion", counts, names[:count], caption)
        else:
            yield figure("Confusion", pictures.confusion(counts, names[:count]), caption)
    pairs = said.confused(outcomes.label, outcomes.predicted, MOST_CONFUSED)
    if pairs:
        rows = [(names[own], names[other], times) for own, other, times in pairs]
        yield table(("class", "said to be", "times"), rows, "The commonest mistakes")


def _calibration(curve: said.Reliability, outcomes: said.Outcomes) -> Iterator[Html]:
    confidence, accuracy = float(np.nanmean(outcomes.probability[:, 0])), float(outcomes.right.mean())
    yield tiles(
        [
            ("expected calibration error", f"{curve.error:.1%}"),
            ("mean confidence", f"{confidence:.1%}"),
            ("accuracy", f"{accuracy:.1%}"),
        ]
    )
    filled = curve.samples > 0
    lines = [
        Curve("this model", curve.confidence[filled], curve.accuracy[filled]),
        Curve("as sure as right", [0, 1], [0, 1]),
    ]
    drawn = chart("Reliability", "confidence", "accuracy", lines)
    edges = np.linspace(0, 1, len(curve.samples) + 1)
    bins = (
        (f"{low:.2f} to {high:.2f}", *(_number(column[n]) for column in curve[:3]))
        for n, (low, high) in enumerate(pairwise(edges))
        if curve.samples[n]
    )
    yield grid(drawn, table(("confidence", "samples", "mean confidence", "accuracy"), bins))
    yield text(
        f"Predictions are counted in {len(curve.samples)} bins of equal width; the error is the mean"
        " distance of the two curves over all predictions (Guo et al., 2017). Below the diagonal the model is"
        " surer than it is right."
    )


def _number(value: Any) -> float | int | None:
    """A number of NumPy's as Python's; None where there is none."""
    number = value.item()
    return None if number != number else number


# --- the data --------------------------------------------------------------------------------------------


def _data(found: Findings) -> Iterator[Html]:
    if found.train is None or found.eval is None:
        return
    both = {"training": found.train, "evaluation": found.eval}
    head = ("set", "samples", "looked at", "sizes", "can't be read")
    rows = [(name, one.samples, one.seen, _sizes(one), len(one.unreadable)) for name, one in both.items()]
    parts = [table(head, rows)]
    if any(one.seen < one.samples for one in both.values() if one.seen):
        parts.append(text("Not all images were looked at for sizes, twins and leaks; --all looks at all."))
    if not found.train.seen:
        parts.append(text("Its samples are no images, so they were not compared with each other."))
    else:
        parts += _twins(found)
    if by_class := _by_class(found):
        parts.append(table(("class", "training", "evaluation"), by_class, "Samples of each class"))
    unreadable = [reason for one in both.values() for reason in one.unreadable]
    if unreadable:
        parts.append(table(("why an image can't be read",), [(reason,) for reason in unreadable[:50]]))
    yield section("Data", *parts)


def _sizes(one: Looked) -> str:
    """The commonest sizes of images, height by width."""
    sizes = [f"{shape[-2]} x {shape[-1]}" for shape, _ in one.shapes.most_common(3) if len(shape) > 1]
    more = len(one.shapes) - len(sizes)
    return ", ".join(sizes) + (f" and {more:,} more" if more else "")


def _by_class(found: Findings) -> list[tuple[Any, ...]]:
    train, other = (one.labels if one else None for one in (found.train, found.eval))
    if train is None or other is None or not found.known:
        return []
    counts = [np.bincount(labels, minlength=found.known).tolist() for labels in (train, other)]
    return list(zip(found.classes, *counts, strict=False))


def _twins(found: Findings) -> list[Html]:
    """Images that are in both sets, and those that are twice in the training set."""
    parts = []
    if found.leaks:
        title = f"Leaks: {found.leaked:,} eval samples with the pixels of a training sample"
        parts.append(table(("training", "evaluation"), found.leaks, title))
    if found.twins:
        title = f"Twins: {found.twinned:,} training samples repeat the pixels of another"
        parts.append(table(("samples", "classes"), found.twins, title))
    if not parts:
        parts.append(text("No two images have the same pixels, neither in the training set nor in both."))
    return parts


# --- on a terminal ---------------------------------------------------------------------------------------


def show(record: Recorded, found: Findings) -> None:
    """Prints the report in short."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False, markup=False, emoji=False)
    lines = Table.grid(padding=(0, 2))
    lines.add_column(style="dim", no_wrap=True)
    lines.add_column(overflow="fold")
    for name, value in in_short(record, found):
        lines.add_row(printable(name), printable(value))
    console.print(lines)


def in_short(record: Recorded, found: Findings) -> Iterator[tuple[str, str]]:
    """What a terminal shows, as (name, text)."""
    status, (name, best, at) = record.status, record.best
    step, total = status.get("step", 0), status.get("total_steps", 0)
    yield record.folder.name, f"{status.get('state', 'unknown')} at step {step:,} of {total:,}"
    if best is not None:
        last = (status.get("metrics") or {}).get(name)
        yield (
            name,
            f"best {best:.4g}"
            + (f" at step {at:,}" if at else "")
            + f", last {last:.4g}" * (last is not None),
        )
    if status.get("goodput") is not None:
        yield "goodput", f"{status['goodput']:.1%} in {counted(status.get('attempts', 1), 'attempt')}"
    if (outcomes := found.outcomes) is not None:
        error = said.reliability(outcomes.probability[:, 0], outcomes.right).error
        yield "measured", found.of
        yield "calibration", f"{error:.1%} expected error"
        pairs = said.confused(outcomes.label, outcomes.predicted, 3)
        names = found.classes
        mistakes = [f"{names[own]} said to be {names[other]} ({times:,})" for own, other, times in pairs]
        yield "mistakes", ", ".join(mistakes) or "none"
    if found.train and found.eval:
        twins = f", {found.twinned:,} training images twice" if found.twinned else ""
        yield "data", f"{found.train.samples:,} training and {found.eval.samples:,} eval samples{twins}"
    for sentence in troubles(record, found):
        yield "note", sentence
