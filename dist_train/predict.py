"""What a trained model is used for: predicting images, and evaluating it again.

Both need a run's folder, a checkpoint file or an exported one, and nothing else: see trained.py.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_train import checkpoint, data, exported, models, runtime, tasks
from dist_train.checkpoint.files import write_output
from dist_train.config import GIVEN, Config, UserError, completed, from_file, nearest, printable, with_given
from dist_train.data.images import as_text, image_paths, read_image, shrunk
from dist_train.evaluate import evaluate
from dist_train.trained import contents, load_model, trained

__all__ = ["evaluate_run", "load_model", "predict"]

FORMATS = ("table", "csv", "json")
BATCH = 64  # images predicted at once
# What an evaluation needs of a configuration: not where the run lies, how it was trained and mirrored.
EVALUATED = ("data.", "model.", "task.", "eval.", "train.batch_size", "train.accumulate", "seed", "device",
             "precision", "compile", "channels_last", "deterministic", "threads", "timeout_seconds",
             "watchdog_seconds", "stop_after", "train.ema")  # fmt: skip


@torch.inference_mode()
def predict(
    place: str | Path,
    images: Iterable[Path],
    top: int = 3,
    *,
    model: nn.Module | None = None,
    trust: bool = False,
) -> tuple[list[dict[str, Any]], list[str]]:
    """The `top` most probable classes of each image, and a sentence for each that can't be read.

    A row is `{"image": path, "class": name, "probability": p, "top": [[name, p], ...]}`. `model` and
    `trust` are as for `load_model`.
    """
    model, saved, transform = for_images(place, model, trust)
    shape, classes, any_size = saved["sample_shape"], len(saved["classes"]), saved.get("any_size", False)
    config = completed(saved["config"])
    task, shorter = config["task"]["name"], config["data"]["cache_size"]
    if task == "segmentation":
        raise UserError(f"{place}: predicts masks, no classes; name a folder for them by --masks FOLDER.")
    outputs = models.probe(model, torch.zeros(2, *shape), type(model).__name__)
    width = outputs.shape[1] if outputs.ndim == 2 else 0
    # A classifier may have spare outputs, as pretrained ones do; those of another task may mean anything.
    if not width or (width < classes if task == "classification" else width != classes):
        raise UserError(
            f"{place}: predicts no classes: its task is '{task}', and its model gives"
            f" {list(outputs.shape[1:])} for an image, not one number for each of {classes} classes."
        )
    rows: list[dict[str, Any]] = []
    errors: list[str] = []
    for files in _batches(image_files(images, errors)):
        tensors, readable = [], []
        for file in files:
            try:
                image = transform.geometry(shrunk(read_image(file, shape[0]), shorter))
                if not any_size and list(image.shape[-2:]) != shape[-2:]:  # the model knows one size only
                    from torchvision.transforms.v2.functional import resize

                    image = resize(image, shape[-2:], antialias=True)
                tensors.append(transform.normalize(image))
                readable.append(file)
            except UserError as error:
                errors.append(str(error))
        if tensors:
            batches = [image[None] for image in tensors] if any_size else [torch.stack(tensors)]
            probabilities = torch.cat([model(batch).softmax(1) for batch in batches])
            best = probabilities.topk(min(top, probabilities.shape[1]), dim=1)
            for file, values, indices in zip(readable, best.values, best.indices, strict=True):
                ranked = [
                    [saved["classes"][i] if i < len(saved["classes"]) else str(i), round(p, 6)]
                    for p, i in zip(values.tolist(), indices.tolist(), strict=True)
                ]
                name, probability = ranked[0]
                row = {"image": as_text(file), "class": name, "probability": probability}
                rows.append(row | {"top": ranked})
    return rows, errors


def for_images(
    place: str | Path, model: nn.Module | None, trust: bool
) -> tuple[nn.Module, dict[str, Any], data.ImageTransform]:
    """The trained model, the checkpoint's other contents, and what is done to an image file ahead of it.

    Raises UserError where the model takes no images.
    """
    path, saved = contents(place)
    needed = [
        "data.eval_transform",
        "data.mean",
        "data.std",
        "data.cache_size",
        *(["model."] if model is None else []),
    ]
    config, shape = from_file(saved["config"], path, needed=needed, trust=trust), saved["sample_shape"]
    if len(shape) != 3 or shape[0] not in (1, 3, 4):
        raise UserError(f"{place}: its model takes no image files, but arrays of shape {shape}.")
    found = trained(path, saved, config, model, trust)
    source = completed(saved["config"])["data"]["name"]
    if source.startswith(GIVEN):
        print(
            f"note: the run's images came from a '{source.removeprefix(GIVEN)}'; what it did to them itself"
            " is not done here, only data.eval_transform.",
            file=sys.stderr,
        )
    return found, saved, data.eval_transform(config)


def task_of(place: str | Path) -> str:
    """The name of the task that a run was trained for."""
    _, saved = contents(place, lambda text: None)
    return str(completed(saved["config"])["task"]["name"])


def check_format(name: str) -> None:
    """Raises UserError for an unknown output format."""
    if name not in FORMATS:
        near = nearest(name, FORMATS)
        raise UserError(f"--format: can't be '{name}'; choose one of {', '.join(FORMATS)}{near}.")


def write(rows: Sequence[dict[str, Any]], format: str, output: Path | None) -> None:
    """Writes predictions as a table, CSV or JSON, to `output` or the standard output."""
    if format == "json":
        text = json.dumps(list(rows), indent=2) + "\n"
    elif format == "csv":
        text = _csv(rows)
    else:
        text = _table(rows)
    write_text(text, output)


def write_text(text: str, output: Path | None) -> None:
    """Writes a text to `output` or the standard output."""
    if output is None:
        sys.stdout.write(printable(text))
        return
    write_output(output, text.encode())


@dataclass(frozen=True)
class Evaluation:
    """A trained model and its eval set, ready to be measured; on each rank."""

    path: Path  # the checkpoint or the exported file
    saved: dict[str, Any]  # its contents
    config: Config
    ranks: runtime.Runtime
    sets: data.Data
    task: tasks.Task
    model: nn.Module

    def of(self, samples: data.Samples) -> Evaluation:
        """The same of other samples, as a part of the eval set."""
        return replace(self, sets=replace(self.sets, eval=samples))

    def measure(self, task: tasks.Task) -> dict[str, float]:
        """What `task` reports of the whole eval set."""
        config, ranks, parts = self.config, self.ranks, self.saved["parts"]
        parts = parts if config.train.batch_size % parts == 0 else None  # as in the run
        batches = self.sets.eval_loader(config, ranks, parts)
        moved = (batch.to(ranks.device, config.channels_last) for batch in batches)
        metrics, unread = evaluate(self.model, moved, task, ranks)
        for _, reason in unread if ranks.is_main else ():
            print(f"left out: {printable(reason)}", file=sys.stderr)
        return metrics


def evaluate_run(
    place: str | Path,
    overrides: Sequence[str] = (),
    *,
    model: nn.Module | None = None,
    train_data: Any = None,
    eval_data: Any = None,
    task: tasks.Task | None = None,
    trust: bool = False,
) -> dict[str, float]:
    """The metrics of a run's best checkpoint on its whole eval set, on all the processes there are.

    Args:
        overrides: `key=value` changes, such as data.root or device.
        model, train_data, eval_data, task: used instead of what the configuration names, as in `fit`;
            the training set only where data.eval_fraction holds out a part of it.
        trust: whether the file may name any object, as `overrides` may.
    """
    given = {"model": model, "train_data": train_data, "eval_data": eval_data, "task": task}
    with evaluation(place, overrides, trust, **given) as ready:
        return ready.measure(ready.task)


@contextmanager
def evaluation(
    place: str | Path, overrides: Sequence[str] = (), trust: bool = False, **objects: Any
) -> Iterator[Evaluation]:
    """What `evaluate_run` measures, on all the processes there are; the arguments are as there."""
    model, task, eval_data = (objects.get(name) for name in ("model", "task", "eval_data"))
    train_data = objects.get("train_data") if eval_data is None else eval_data
    warnings: list[str] = []
    path, saved = contents(place, warnings.append)
    config = evaluated(path, saved, overrides, {"model": model, "task": task, "data": eval_data}, trust)
    # What a task of one's own takes for a target is not known.
    config = with_given(config, model=model, data=train_data, task=task)
    ranks = runtime.start(config)
    try:
        for note in warnings if ranks.is_main else ():
            checkpoint.tell(note)
        with ranks.together():
            model = trained(path, saved, config, model, trust)
            with ranks.main_of_node_first():
                found = data.opened(config, train_data, eval_data)
            sets = data.build(config, *found)
            check_classes(sets, saved)
            task = tasks.build(config) if task is None else tasks.complete(task)
            batch, outputs = data.first_batch(sets.eval), None
            if isinstance(task, tasks.SampleTask):
                outputs = models.probe(model, batch.inputs, config.model.name).to(ranks.device)
                batch = batch.to(ranks.device)
            if not isinstance(model, exported.Program):  # it has no gradient that a task could be tried on
                tasks.check(task, model, batch, outputs, len(sets.classes))
        model = ranks.accelerator.prepare_model(model.to(ranks.device), evaluation_mode=True)
        yield Evaluation(path, saved, config, ranks, sets, task, model)
    finally:
        runtime.stop(ranks.accelerator)


def evaluated(
    path: Path, saved: dict[str, Any], overrides: Sequence[str], given: dict[str, Any], trust: bool
) -> Config:
    """The configuration of an evaluation, of what `contents` found.

    Args:
        overrides, trust: as for `evaluate_run`.
        given: by section an object that is used instead of the one that the configuration names, or None.
    """
    # These are of no meaning here, and may not suit the eval set.
    unused = ["data.drop_last=false", "data.train_transform=null"]
    needed = [key for key in EVALUATED if given.get(key.rstrip(".")) is None]
    needed += ["data.eval_transform", "data.mean", "data.std"]
    return from_file(saved["config"], path, [*overrides, *unused], needed=needed, trust=trust)


def check_classes(sets: data.Data, saved: dict[str, Any]) -> None:
    """Raises UserError where the labels of some data don't mean what they meant in the run."""
    if sets.classes != saved["classes"][: len(sets.classes)]:  # fewer may be missing at the end
        raise UserError(
            f"data: its classes ({', '.join(sets.classes)}) are not those of the run"
            f" ({', '.join(saved['classes'])}), so label numbers would not mean the same."
        )


def image_files(places: Iterable[Path], errors: list[str]) -> Iterator[Path]:
    """The files themselves, and of folders all images below them."""
    for place in places:
        if not place.is_dir():
            yield place
            continue
        found = image_paths(place)
        if not found:
            errors.append(f"{place}: holds no images.")
        yield from found


def _batches(files: Iterable[Path]) -> Iterator[list[Path]]:
    batch: list[Path] = []
    for file in files:
        batch.append(file)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    width = max((len(row["top"]) for row in rows), default=0)
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    ranks = [name for rank in range(1, width + 1) for name in (f"class_{rank}", f"probability_{rank}")]
    writer.writerow(["image", *ranks])
    for row in rows:
        ranked = (cell for name, p in row["top"] for cell in (printable(name), p))
        writer.writerow([printable(row["image"]), *ranked])
    return stream.getvalue()


def _table(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return ""
    cells = [
        [printable(row["image"]), *(f"{printable(name)} {p:6.1%}" for name, p in row["top"])] for row in rows
    ]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = ("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in cells)
    return "".join(f"{line.rstrip()}\n" for line in lines)
