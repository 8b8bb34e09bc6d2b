"""`dist-train eval --save`: what a run's model says of each sample of its eval set, as files.

A folder for each checkpoint and data set, `evaluations/step-00000040-image_folder` in the run's folder, that
is written whole or not at all. On any number of processes its files are the same.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dist_train import outcomes as said
from dist_train.config import UserError, printable
from dist_train.data import ImageTransform
from dist_train.data.csv_file import column
from dist_train.data.samples import Samples
from dist_train.outcomes import Keeping, Outcomes
from dist_train.predict import Evaluation, evaluation
from dist_train.tools.pictures import Cell, confusion, write_grid

WORST = 32  # images in the sheet
COLUMNS = 8
MOST_SPARE = 100_000  # outputs of a model beyond its classes
MOST_CLASSES = 1_000  # in a confusion matrix: there is a cell for each pair


class Saved(NamedTuple):
    """What `evaluate` has measured, the same on each rank."""

    metrics: dict[str, float]
    slices: list[said.Slice]  # by the values of a column, if one was named
    folder: Path | None  # where it is saved


def evaluate(
    place: str | Path,
    overrides: Sequence[str] = (),
    *,
    save: bool = True,
    by: str = "",
    overwrite: bool = False,
    trust: bool = False,
) -> Saved:
    """Measures a run's best checkpoint on its whole eval set, and saves what it says of each sample.

    Args:
        place, overrides, trust: as for `evaluate_run`.
        by: a column of the CSV file that lists the images: accuracy and loss by its values.
        overwrite: whether a folder of an earlier evaluation is replaced; otherwise that is refused.

    Raises UserError for what is no classification, before anything is measured.
    """
    with evaluation(place, overrides, trust) as ready:
        ranks = ready.ranks
        with ranks.together():
            keeping = Keeping(ready.task)
            values = of_column(ready, by) if by else []
            folder = folder_of(ready, overrides) if save else None
            if ranks.is_main and folder and folder.exists() and not overwrite:
                raise UserError(f"{folder}: is there already; --overwrite replaces it.")
        metrics = ready.measure(keeping)
        outcomes = keeping.gathered(ranks)
        calibration = said.reliability(outcomes.probability[:, 0], outcomes.right)
        metrics |= {"eval/calibration_error": calibration.error}
        slices = said.slices([values[n] for n in outcomes.sample], outcomes) if by else []
        with ranks.together():
            if ranks.is_main and folder:
                notes = {"metrics": metrics, "overrides": list(overrides), **_identity(ready)}
                try:
                    _write(folder, ready.sets.eval, outcomes, notes, slices)
                except OSError as error:
                    raise UserError(f"{folder}: can't be written: {error.strerror}.") from None
        return Saved(metrics, slices, folder)


def told(done: Saved) -> list[str]:
    """What a terminal shows beside the metrics."""
    width = max((len(printable(one.value)) for one in done.slices), default=0)
    lines = [
        f"{printable(one.value):{width}}  {one.samples:>8,} samples  accuracy {one.accuracy:.4f}"
        f"  loss {one.loss:.4g}"
        for one in done.slices
    ]
    return lines + ([f"written: {done.folder}"] if done.folder else [])


def of_column(ready: Evaluation, name: str) -> list[str]:
    """What each sample of the eval set has in a column of its CSV file."""
    options = ready.config.data
    if options.name != "csv":
        raise UserError(
            f"--by: only images listed in a CSV file have columns, not those of '{options.name}'."
        )
    positions = ready.sets.eval.source.positions  # a part of the training file, where there is no other
    values = column(name, options.root, positions is not None, options.args)
    return values if positions is None else [values[position] for position in positions]


def folder_of(ready: Evaluation, overrides: Sequence[str]) -> Path:
    """The folder for this checkpoint, data set and changes of the configuration, in the run's folder."""
    place = ready.path.parent
    name = f"{ready.path.resolve().stem}-{ready.config.data.name}".replace(":", ".")
    if overrides:
        name += f"-{hashlib.sha256(json.dumps(sorted(overrides)).encode()).hexdigest()[:8]}"
    return (place.parent if place.name == "checkpoints" else place) / "evaluations" / name


def read(folder: Path) -> tuple[Outcomes, dict[str, Any], list[str]]:
    """What `evaluate` saved in a folder: what the model said, the notes on it, and each image's name.

    Raises UserError for what it has not written.
    """
    try:
        with np.load(folder / "outcomes.npz", allow_pickle=False) as stored:
            outcomes = Outcomes(**stored)
        notes = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        with (folder / "predictions.csv").open(encoding="utf-8", newline="") as file:
            names = [row["image"] for row in csv.DictReader(file)]
        if not _fits(outcomes, len(names), len(notes["classes"])):
            raise ValueError
    except (OSError, ValueError, TypeError, LookupError, zipfile.BadZipFile):
        raise UserError(f"{folder}: not what `eval --save` writes; delete it, or write it anew.") from None
    return outcomes, notes, names


def _fits(outcomes: Outcomes, samples: int, classes: int) -> bool:
    """Whether stored arrays are of one length, and their classes below those that there may be."""
    ranked, columns = outcomes.ranked, vars(outcomes).values()
    return (
        all(len(column) == samples for column in columns)
        and ranked.ndim == 2
        and ranked.shape == outcomes.probability.shape
        and bool(((outcomes.label >= 0) & (outcomes.label < classes)).all())
        and bool(((ranked >= 0) & (ranked < classes + MOST_SPARE)).all())
    )


def class_names(classes: Sequence[str], outcomes: Outcomes) -> list[str]:
    """The names of all classes, and of spare outputs that were among the most probable: their numbers."""
    return [*classes, *map(str, range(len(classes), int(outcomes.ranked.max(initial=-1)) + 1))]


def image_cells(samples: Samples, outcomes: Outcomes, places: Iterable[int], names: list[str]) -> list[Cell]:
    """Images as they are read, each with its class and what the model says that it is."""
    plain = ImageTransform()
    cells = []
    for place in places:
        image, _ = samples.pair(int(outcomes.sample[place]))
        own, other = names[outcomes.label[place]], names[outcomes.predicted[place]]
        title = f"{own}\nsaid: {other} {outcomes.probability[place, 0]:.0%}"
        cells.append((plain(image), title))
    return cells


# --- files -------------------------------------------------------------------------------------------------


def _identity(ready: Evaluation) -> dict[str, Any]:
    """Of what model and data an evaluation is."""
    return {
        "checkpoint": ready.path.resolve().name,
        "step": ready.saved.get("step"),
        "classes": ready.saved["classes"],
        "data": {"name": ready.config.data.name, "root": ready.config.data.root},
    }


def _write(
    folder: Path, samples: Samples, outcomes: Outcomes, notes: dict[str, Any], slices: list[said.Slice]
) -> None:
    """Writes the folder: in one of its own first, so that it is there whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as own:
        made = Path(own) / folder.name
        made.mkdir()
        _write_files(made, samples, outcomes, notes, slices)
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)


def _write_files(
    folder: Path, samples: Samples, outcomes: Outcomes, notes: dict[str, Any], slices: list[said.Slice]
) -> None:
    names = class_names(notes["classes"], outcomes)
    _json(folder / "evaluation.json", {**notes, "samples": len(outcomes)})
    np.savez(folder / "outcomes.npz", **vars(outcomes))
    _csv(folder / "predictions.csv", *_predictions(samples, outcomes, names))
    names = names[: max(len(notes["classes"]), outcomes.predicted.max() + 1)]
    rows = said.by_class(outcomes.label, outcomes.predicted, len(names))
    _csv(folder / "classes.csv", ["class", *rows._fields], zip(names, *rows, strict=True))
    curve = said.reliability(outcomes.probability[:, 0], outcomes.right)
    tops = np.arange(1, len(curve.samples) + 1) / len(curve.samples)
    head = ["confidence_up_to", "samples", "mean_confidence", "accuracy"]
    _csv(folder / "calibration.csv", head, zip(tops, *curve[:3], strict=True))
    if slices:
        _csv(folder / "slices.csv", said.Slice._fields, slices)
    if len(names) <= MOST_CLASSES:
        matrix = said.confusion(outcomes.label, outcomes.predicted, len(names))
        _csv(
            folder / "confusion.csv",
            ["class", *names],
            ([n, *r] for n, r in zip(names, matrix, strict=True)),
        )
        (folder / "confusion.png").write_bytes(confusion(matrix, names))
    if samples.transform is not None:
        cells = image_cells(samples, outcomes, said.worst(outcomes, WORST), names)
        write_grid([cells[n : n + COLUMNS] for n in range(0, len(cells), COLUMNS)], folder / "worst.png")


def _predictions(
    samples: Samples, outcomes: Outcomes, names: list[str]
) -> tuple[list[str], Iterable[Sequence[Any]]]:
    """The head and the rows of predictions.csv."""
    ranks = range(outcomes.ranked.shape[1])
    head = ["sample", "image", "class", "loss", "probability"]
    head += [name for rank in ranks for name in (f"class_{rank + 1}", f"probability_{rank + 1}")]
    columns = (outcomes.sample, outcomes.label, outcomes.loss, outcomes.of_label)

    def rows() -> Iterable[Sequence[Any]]:
        for place, (sample, label, loss, of_label) in enumerate(zip(*columns, strict=True)):
            ranked = zip(outcomes.ranked[place], outcomes.probability[place], strict=True)
            said = [cell for number, share in ranked for cell in (names[number], share)]
            yield sample, path_of(samples, int(sample)), names[label], loss, of_label, *said

    return head, rows()


def path_of(samples: Samples, index: int) -> str:
    """The file of a sample, or nothing where there is none."""
    name = samples.name(index)
    return "" if name.startswith("sample ") else name


def _csv(path: Path, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(map(printable, head))
    writer.writerows([_cell(value) for value in row] for row in rows)
    path.write_text(stream.getvalue(), encoding="utf-8")


def _cell(value: Any) -> str:
    """A number to six digits, and nothing for one that isn't there."""
    if isinstance(value, (float, np.floating)):
        return "" if np.isnan(value) else f"{value:.6g}"
    return printable(str(value))


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
