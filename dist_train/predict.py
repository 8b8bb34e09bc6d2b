"""What a trained model is used for: predicting images, and evaluating it again.

Both need a run's folder or one checkpoint file and nothing else: it holds the weights, the
configuration, the class names and the shape of a sample.
"""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_train import checkpoint, data, models, runtime, tasks
from dist_train.checkpoint.files import write_output
from dist_train.config import GIVEN, Config, UserError, completed, from_file, nearest, printable, with_given
from dist_train.data.images import as_text, image_paths, read_image, shrunk
from dist_train.evaluate import evaluate

FORMATS = ("table", "csv", "json")
BATCH = 64  # images predicted at once
MOST_VALUES = 2**26  # in an image of a model that may come from elsewhere
# What arguments without sense make a model raise.
UNBUILDABLE = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, AssertionError,
               RuntimeError, MemoryError)  # fmt: skip
# What an evaluation needs of a configuration: not where the run lies, how it was trained and mirrored.
EVALUATED = ("data.", "model.", "task.", "eval.", "train.batch_size", "train.accumulate", "seed", "device",
             "precision", "compile", "channels_last", "deterministic", "threads", "timeout_seconds",
             "watchdog_seconds", "stop_after", "train.ema")  # fmt: skip


def load_model(
    place: str | Path, *, model: nn.Module | None = None, trust: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """The trained model in evaluation mode, on the CPU, and the checkpoint's other contents.

    Args:
        place: a run's folder (its best checkpoint, else its newest) or a checkpoint file.
        model: gets the weights, instead of a model that is made by its name; one that a program gave to
            `fit` has none.
        trust: whether the file may name any object, which is imported and called; otherwise only the models
            of this package, torchvision and timm.

    Raises UserError if there is none, or none that can be trusted.
    """
    path = checkpoint.find(place)
    saved = checkpoint.load(path, verified=True)
    config = from_file(saved["config"], path, needed=["model."] if model is None else [], trust=trust)
    return _trained(path, saved, config, model, trust), saved


def _trained(
    path: Path, saved: dict[str, Any], config: Config, model: nn.Module | None, trust: bool
) -> nn.Module:
    """`model`, or the one that `config` names, with the weights of a checkpoint."""
    what = f"model '{config.model.name}'"
    if model is not None:
        what = f"the {type(model).__name__} that is given"
    else:
        args, shape = dict(config.model.args), saved["sample_shape"]
        loaded = ("weights", "weights_backbone", "pretrained")
        for name in loaded if ":" not in config.model.name else ("weights",):
            args.pop(name, None)  # those in the file take their place
        if math.prod(shape) > MOST_VALUES and not trust:
            raise UserError(f"{path}: images of shape {shape}; if you trust the file: --trust (trust=True).")
        try:
            with nullcontext() if trust else models.no_larger(checkpoint.size_of(path), str(path)):
                model = models.build(config.model.name, args, shape, max(1, len(saved["classes"])))
        except UNBUILDABLE as error:
            if trust:
                raise
            reason = " ".join(str(error).split()).rstrip(".")
            raise UserError(f"{path}: {what} can't be built: {type(error).__name__}: {reason}.") from None
    try:
        model.load_state_dict(saved["average"] or saved["model"])
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: does not fit {what}: {reason}") from None
    return model.eval()


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
    shape, classes = saved["sample_shape"], len(saved["classes"])
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
                if list(image.shape[-2:]) != shape[-2:]:  # the model knows one size only
                    from torchvision.transforms.v2.functional import resize

                    image = resize(image, shape[-2:], antialias=True)
                tensors.append(transform.normalize(image))
                readable.append(file)
            except UserError as error:
                errors.append(str(error))
        if tensors:
            probabilities = model(torch.stack(tensors)).softmax(1)
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
    path = checkpoint.find(place)
    saved = checkpoint.load(path, verified=True)
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
    trained = _trained(path, saved, config, model, trust)
    source = completed(saved["config"])["data"]["name"]
    if source.startswith(GIVEN):
        print(
            f"note: the run's images came from a '{source.removeprefix(GIVEN)}'; what it did to them itself"
            " is not done here, only data.eval_transform.",
            file=sys.stderr,
        )
    return trained, saved, data.eval_transform(config)


def task_of(place: str | Path) -> str:
    """The name of the task that a run was trained for."""
    saved = checkpoint.load(checkpoint.find(place, lambda text: None), verified=True)
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
    warnings: list[str] = []
    path = checkpoint.find(place, warnings.append)
    saved = checkpoint.load(path, verified=True)
    # These are of no meaning here, and may not suit the eval set.
    unused = ["data.drop_last=false", "data.train_transform=null"]
    given = (("model.", model), ("task.", task), ("data.", eval_data))
    needed = [key for key in EVALUATED if all(key != section or item is None for section, item in given)]
    needed += ["data.eval_transform", "data.mean", "data.std"]
    config = from_file(saved["config"], path, [*overrides, *unused], needed=needed, trust=trust)
    config = with_given(
        config, model=model, data=train_data if eval_data is None else eval_data, task=task
    )  # what a task of one's own takes for a target is not known
    ranks = runtime.start(config)
    try:
        for note in warnings if ranks.is_main else ():
            checkpoint.tell(note)
        with ranks.together():
            model = _trained(path, saved, config, model, trust)
            with ranks.main_of_node_first():
                found = data.opened(config, train_data if eval_data is None else eval_data, eval_data)
            sets = data.build(config, *found)
            if sets.classes != saved["classes"][: len(sets.classes)]:  # fewer may be missing at the end
                raise UserError(
                    f"data: its classes ({', '.join(sets.classes)}) are not those of the run"
                    f" ({', '.join(saved['classes'])}), so label numbers would not mean the same."
                )
            task = tasks.build(config) if task is None else tasks.complete(task)
            batch, outputs = data.first_batch(sets.eval), None
            if isinstance(task, tasks.SampleTask):
                outputs = models.probe(model, batch.inputs, config.model.name).to(ranks.device)
                batch = batch.to(ranks.device)
            tasks.check(task, model, batch, outputs, len(sets.classes))
        model = ranks.accelerator.prepare_model(model.to(ranks.device), evaluation_mode=True)
        parts = saved["parts"] if config.train.batch_size % saved["parts"] == 0 else None  # as in the run
        batches = sets.eval_loader(config, ranks, parts)
        moved = (batch.to(ranks.device, config.channels_last) for batch in batches)
        metrics, unread = evaluate(model, moved, task, ranks)
        for _, reason in unread if ranks.is_main else ():
            print(f"left out: {printable(reason)}", file=sys.stderr)
        return metrics
    finally:
        runtime.stop(ranks.accelerator)


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
