"""Data sets by name: Fashion-MNIST, torchvision's, folders, CSV files, arrays, and the user's own.

A source is a function of (root, train, ...) that returns a map-style data set of (image, label) with
`classes`, the list of class names; or None where there is no evaluation part.
"""

from __future__ import annotations

import csv as csv_module
import inspect
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torchvision.datasets.folder import IMG_EXTENSIONS

from dist_train.config import UserError, construct, import_object, nearest
from dist_train.data.fashion_mnist import fashion_mnist
from dist_train.data.images import ImageFiles, InMemory

# --- sources by name: each takes (root, train, ...) and returns a data set, or None without an eval set


def image_folder(
    root: str | None = None,
    train: bool = True,
    channels: int = 3,
    train_dir: str = "train",
    eval_dir: str = "",
) -> ImageFiles | None:
    """A folder per class under `root`/train and `root`/val (or eval, test); or right under `root`."""
    if not root:
        raise UserError("data.root: an image_folder needs the folder of its images.")
    top = Path(root)
    if not top.is_dir():
        raise UserError(f"data.root: there is no folder {top}{_near_path(top)}.")
    has_train = (top / train_dir).is_dir()
    if train:
        return _class_folders(top / train_dir if has_train else top, channels)
    candidates = [eval_dir] if eval_dir else ["val", "eval", "test", "valid", "validation"]
    found = [top / name for name in candidates if (top / name).is_dir()] if has_train or eval_dir else []
    if not found:
        if eval_dir:
            raise UserError(f"data.args.eval_dir: there is no folder {top / eval_dir}.")
        return None
    return _class_folders(found[0], channels)


def csv(
    annotations_file: str,
    img_dir: str = "",
    root: str | None = None,
    train: bool = True,
    eval_annotations_file: str | None = None,
    eval_img_dir: str | None = None,
    classes: list[str] | None = None,
    channels: int = 3,
) -> ImageFiles | None:
    """Images listed in a CSV file with rows of file name and label, with or without a header.

    Labels are whole numbers (with `classes` for their names) or names. Paths are relative to `img_dir`,
    and that to `root`.
    """
    base = Path(root or "")
    if train:
        return _csv_rows(base / annotations_file, base / img_dir, classes, channels)
    if eval_annotations_file is None:
        return None
    if classes is None:  # the eval file may lack a class: names are those of the training file
        classes = _csv_rows(base / annotations_file, None, None, channels).classes
    folder = img_dir if eval_img_dir is None else eval_img_dir
    return _csv_rows(base / eval_annotations_file, base / folder, classes, channels)


def arrays(
    images: str = "",
    labels: str = "",
    eval_images: str = "",
    eval_labels: str = "",
    root: str | None = None,
    train: bool = True,
    classes: list[str] | None = None,
) -> InMemory | None:
    """NumPy arrays: `root` an .npz file with x_train, y_train and x_test, y_test; or four .npy files.

    Images are `[N, H, W]`, `[N, H, W, C]` or `[N, C, H, W]`, uint8 or float; labels whole numbers or floats.
    """
    if root and Path(root).suffix == ".npz":
        where, names = root, ("x_train", "y_train") if train else ("x_test", "y_test")
        with _numpy_errors(Path(root), "data.root"), np.load(root, allow_pickle=False) as stored:
            if not train and not any(name in stored for name in names):
                return None
            for name in names:
                if name not in stored:
                    raise UserError(f"{root}: has no array '{name}'; it holds {', '.join(stored)}.")
            x, y = stored[names[0]], stored[names[1]]
    else:
        pair = (images, labels) if train else (eval_images, eval_labels)
        if not all(pair):
            if not train and not any(pair):
                return None
            raise UserError(
                "data.args: arrays need `images` and `labels` (.npy files; eval_images and eval_labels"
                " for evaluation), or an .npz file as data.root."
            )
        files = [Path(root or "") / name for name in pair]
        x, y = (_numpy(file, "data.args") for file in files)
        where = str(files[0])
    if len(x) != len(y):
        raise UserError(f"{where}: {len(x)} images but {len(y)} labels.")
    if x.ndim not in (3, 4):
        raise UserError(f"{where}: images must be [N, H, W] or [N, H, W, C], not {list(x.shape)}.")
    for what, array in (("images", x), ("labels", y)):
        if array.dtype.kind not in "biuf":
            raise UserError(f"{where}: the {what} must be numbers, not of type {array.dtype}.")
    tensor = torch.from_numpy(np.ascontiguousarray(x))
    if tensor.ndim == 3:
        tensor = tensor.unsqueeze(1)
    elif tensor.shape[-1] in (1, 3, 4) and tensor.shape[1] not in (1, 3, 4):
        tensor = tensor.permute(0, 3, 1, 2).contiguous()
    target = torch.from_numpy(np.ascontiguousarray(y))
    if target.is_floating_point():
        return InMemory(tensor, target.float(), classes or [])
    target = target.long()
    low, high = (int(target.min()), int(target.max())) if len(target) else (0, -1)
    if classes is None:
        classes = [str(number) for number in range(high + 1)]
    if low < 0 or high >= len(classes):
        raise UserError(
            f"{where}: a label is {low if low < 0 else high}, but the {len(classes)} classes are numbered"
            " from 0."
        )
    return InMemory(tensor, target, classes)


SOURCES: dict[str, Callable[..., Any]] = {
    "fashion_mnist": fashion_mnist,
    "image_folder": image_folder,
    "csv": csv,
    "arrays": arrays,
}


def open_source(name: str, root: str | None, train: bool, args: dict[str, Any]) -> Any:
    """The training or evaluation part of the data set `name`; None if it has no evaluation part."""
    if name in SOURCES:
        return construct(SOURCES[name], args, "data.args", root=root, train=train)
    if ":" in name:
        function = import_object(name, "data.name")
        return construct(
            function, args, "data.args", root=root, train=train, split="train" if train else "test"
        )
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
    if cls is torchvision.datasets.FakeData:
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


def _numbered(dataset: Any) -> list[str]:
    """Class names for one of torchvision's data sets that has none: the numbers of its labels."""
    count = getattr(dataset, "num_classes", None)
    for name in ("targets", "labels", "_labels"):
        labels = np.asarray(getattr(dataset, name, []))
        if not count and labels.ndim == 1 and labels.size and labels.dtype.kind in "iu":
            count = int(labels.max()) + 1
    return [str(number) for number in range(count or 0)]


def _class_folders(folder: Path, channels: int) -> ImageFiles:
    classes = sorted(item.name for item in folder.iterdir() if item.is_dir())
    if not classes:
        raise UserError(f"{folder}: holds no class folders; an image_folder has one folder per class.")
    paths, labels = [], []
    for label, name in enumerate(classes):
        files = sorted(f for f in (folder / name).rglob("*") if f.suffix.lower() in IMG_EXTENSIONS)
        if not files:
            raise UserError(f"{folder / name}: the folder of class '{name}' holds no images.")
        paths += files
        labels += [label] * len(files)
    return ImageFiles(paths, labels, classes, channels)


def _csv_rows(file: Path, folder: Path | None, classes: list[str] | None, channels: int) -> ImageFiles:
    """The samples of a CSV file; with `folder` None the images are not looked for."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            rows = [(n, row) for n, row in enumerate(csv_module.reader(stream), 1) if row]
    except OSError as error:
        raise UserError(f"data.args: {file} can't be read: {error.strerror}.") from None
    except (csv_module.Error, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not a CSV file ({error}).") from None
    for number, row in rows:
        if len(row) < 2:
            raise UserError(f"{file}: line {number} has no label; a row is `file name,label`.")
    if rows and not Path(rows[0][1][0].strip()).suffix:
        rows = rows[1:]  # a header: its first cell is a column's name, not a file's
    if not rows:
        raise UserError(f"{file}: lists no images.")
    texts = [row[1].strip() for _, row in rows]
    numeric = all(text.isdigit() for text in texts)
    if numeric:
        labels = [int(text) for text in texts]
        classes = classes or [str(number) for number in range(max(labels) + 1)]
    else:
        classes = classes or sorted(set(texts))
        position = {name: index for index, name in enumerate(classes)}
        for (number, _), text in zip(rows, texts, strict=True):
            if text not in position:
                near = nearest(text, classes)
                raise UserError(f"{file}: line {number}: '{text}' is not among the classes{near}.")
        labels = [position[text] for text in texts]
    if max(labels) >= len(classes):
        number = next(n for (n, _), label in zip(rows, labels, strict=True) if label >= len(classes))
        raise UserError(
            f"{file}: line {number}: label {max(labels)}, but there are only {len(classes)} classes."
        )
    paths = [(folder or Path()) / row[0].strip() for _, row in rows]
    for (number, _), path in zip(rows, paths, strict=True) if folder is not None else ():
        if not path.is_file():
            raise UserError(f"{file}: line {number}: there is no image {path}{_near_path(path)}.")
    return ImageFiles(paths, labels, classes, channels)


def _near_path(path: Path) -> str:
    try:
        return nearest(path.name, [item.name for item in path.parent.iterdir()][:10_000])
    except OSError:
        return ""


def _numpy(file: Path, where: str) -> Any:
    with _numpy_errors(file, where):
        return np.load(file, allow_pickle=False)


@contextmanager
def _numpy_errors(file: Path, where: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{where}: there is no file {file}{_near_path(file)}.") from None
    except (OSError, ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{where}: {file} is no NumPy file without objects ({reason}).") from None
