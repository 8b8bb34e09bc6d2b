"""Data sets by name: Fashion-MNIST, torchvision's, folders, CSV files, arrays, masks, text, shards, your own.

A source is a function of (root, train, ...) that returns a map-style data set of (image, label) with
`classes`, the list of class names; or None where there is no evaluation part.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_train.config import UserError, construct, import_object, nearest
from dist_train.data.arrays import arrays
from dist_train.data.csv_file import csv
from dist_train.data.fashion_mnist import fashion_mnist
from dist_train.data.images import (
    EVAL_FOLDERS,
    ImageFiles,
    InMemory,
    as_text,
    image_paths,
    is_hidden,
    near_path,
)
from dist_train.data.masks import image_masks
from dist_train.data.remote import Downloads
from dist_train.data.shards import shards
from dist_train.data.text import text

# --- sources by name: each takes (root, train, ...) and returns a data set, or None without an eval set


def image_folder(
    root: str | None = None,
    train: bool = True,
    channels: int = 3,
    train_dir: str = "",
    eval_dir: str = "",
) -> ImageFiles | None:
    """A folder per class under `root`/train and `root`/val (or eval, test); or right under `root`.

    Other folders are named by `train_dir` and `eval_dir`. Hidden files and folders are left out.
    """
    if not root:
        raise UserError("data.root: an image_folder needs the folder of its images.")
    top = Path(root)
    if not top.is_dir():
        raise UserError(f"data.root: there is no folder {top}{near_path(top)}.")
    for key, name in (("train_dir", train_dir), ("eval_dir", eval_dir)):
        if name and not (top / name).is_dir():
            raise UserError(f"data.args.{key}: there is no folder {top / name}{near_path(top / name)}.")
    folder = top / (train_dir or ("train" if (top / "train").is_dir() else ""))
    if train:
        if not train_dir and folder == top:
            _refuse_parts(top)
        return _class_folders(folder, channels)
    if eval_dir:
        return _class_folders(top / eval_dir, channels)
    found = [top / name for name in EVAL_FOLDERS if (top / name).is_dir()] if folder != top else []
    return _class_folders(found[0], channels) if found else None


def _refuse_parts(top: Path) -> None:
    """Raises UserError where a folder beside the others is no class, but a part of the set by its name."""
    for folder in sorted(top.iterdir()):
        if folder.is_dir() and folder.name.lower() in ("train", "training", *EVAL_FOLDERS):
            raise UserError(
                f"data.root: {top} has a folder '{folder.name}' but no 'train'; name that of the training"
                " images by data.args.train_dir, or give data.args.train_dir=. where all are classes."
            )


def _class_folders(folder: Path, channels: int) -> ImageFiles:
    folders = sorted(item for item in folder.iterdir() if item.is_dir() and not is_hidden(item.name))
    if not folders:
        raise UserError(f"{folder}: holds no class folders; an image_folder has one folder per class.")
    classes = [as_text(Path(item.name)) for item in folders]
    paths, labels = [], []
    for label, (name, item) in enumerate(zip(classes, folders, strict=True)):
        files = image_paths(item)
        if not files:
            raise UserError(f"{item}: the folder of class '{name}' holds no images.")
        paths += files
        labels += [label] * len(files)
    return ImageFiles(paths, labels, classes, channels)


SOURCES: dict[str, Callable[..., Any]] = {
    "fashion_mnist": fashion_mnist,
    "image_folder": image_folder,
    "csv": csv,
    "arrays": arrays,
    "image_masks": image_masks,
    "text": text,
    "shards": shards,
}


def open_source(
    name: str, root: str | None, train: bool, args: dict[str, Any], downloads: Downloads | None = None
) -> Any:
    """The training or evaluation part of the data set `name`; None if it has no evaluation part."""
    if name in SOURCES:
        return construct(SOURCES[name], args, "data.args", root=root, train=train, downloads=downloads)
    if ":" in name:
        function = import_object(name, "data.name")
        return construct(
            function, args, "data.args", root=root, train=train, split="train" if train else "test"
        )
    import torchvision

    known = [item for item in torchvision.datasets.__all__ if item[0].isupper()]
    if name not in known:
        raise UserError(
            f"data.name: there is no data set '{name}'{nearest(name, [*SOURCES, *known])}; use"
            f" {', '.join(SOURCES)}, a class of torchvision.datasets, or package.module:object."
        )
    return _torchvision(getattr(torchvision.datasets, name), root, train, args)


def _torchvision(cls: type, root: str | None, train: bool, args: dict[str, Any]) -> Any:
    parameters = inspect.signature(cls).parameters
    offered: dict[str, Any] = {"root": root or "data", "download": True, "train": train}
    if cls.__name__ == "FakeData":
        offered["random_offset"] = 0 if train else 1_000_000_007  # other images for evaluation
    args = dict(args)
    eval_split = args.pop("eval_split", None)
    classes = None if "classes" in parameters else args.pop("classes", None)
    if "split" in parameters:
        offered["split"] = "train"
        if not train:
            default = "val" if cls.__name__ in ("ImageNet", "Places365", "Imagenette") else "test"
            args["split"] = eval_split or default
    elif not train and not {"train", "random_offset"} & set(parameters):
        return None
    try:
        dataset = construct(cls, args, "data.args", **offered)
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"data.name: {cls.__name__} could not be opened: {reason}.") from None
    if classes or not hasattr(dataset, "classes"):
        dataset.classes = classes or _numbered(dataset)
    if _is_plain_folder(dataset):  # its files are read as ours are: by threads, and from a cache
        paths, numbers = zip(*dataset.samples, strict=True)
        return ImageFiles([Path(path) for path in paths], numbers, dataset.classes)
    images, labels = getattr(dataset, "data", None), getattr(dataset, "targets", None)
    if not isinstance(images, (np.ndarray, torch.Tensor)) or labels is None:
        return dataset
    images, labels = torch.as_tensor(images), torch.as_tensor(labels)
    if images.dtype != torch.uint8 or labels.ndim != 1 or len(images) != len(labels):
        return dataset
    if images.ndim == 3:
        images = images.unsqueeze(1)
    elif images.shape[-1] == 3:
        images = images.permute(0, 3, 1, 2).contiguous()
    return InMemory(images, labels.long(), dataset.classes)


def _is_plain_folder(dataset: Any) -> bool:
    """Whether it is an ImageFolder (as ImageNet is) that only reads its files."""
    from torchvision.datasets.folder import DatasetFolder, default_loader

    reads = getattr(type(dataset), "__getitem__", None) is DatasetFolder.__getitem__
    return reads and dataset.loader is default_loader and dataset.transforms is None


def _numbered(dataset: Any) -> list[str]:
    """Class names for one of torchvision's data sets that has none: the numbers of its labels."""
    count = getattr(dataset, "num_classes", None)
    for name in ("targets", "labels", "_labels"):
        labels = np.asarray(getattr(dataset, name, []))
        if not count and labels.ndim == 1 and labels.size and labels.dtype.kind in "iu":
            count = int(labels.max()) + 1
    return [str(number) for number in range(count or 0)]
