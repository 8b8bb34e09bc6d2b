"""NumPy arrays as a data set."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_train.config import UserError
from dist_train.data.images import InMemory, near_path
from dist_train.data.labels import numbered


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

    Images are `[N, H, W]`, `[N, H, W, C]` or `[N, C, H, W]`: uint8 (or other whole numbers from 0 to 255),
    uint16 (65535 is white), bool, or floats, which are taken as they are. Labels are whole numbers or floats.
    """
    if root and (Path(root).suffix == ".npz" or Path(root).is_file()):
        where, names = root, ("x_train", "y_train") if train else ("x_test", "y_test")
        found = _from_archive(Path(root), names, optional=not train)
    else:
        pair = (images, labels) if train else (eval_images, eval_labels)
        if not all(pair) and (train or any(pair)):
            raise UserError(
                "data.args: arrays need `images` and `labels` (.npy files; eval_images and eval_labels"
                " for evaluation), or an .npz file as data.root."
            )
        where = str(Path(root or "") / pair[0])
        found = [_from_file(Path(root or "") / name) for name in pair] if all(pair) else []
    if not found:
        return None
    x, y = found
    for what, array in (("images", x), ("labels", y)):
        if array.dtype.kind not in "biuf":
            raise UserError(f"{where}: the {what} must be numbers, not of type {array.dtype}.")
    if x.ndim not in (3, 4):
        raise UserError(f"{where}: images must be [N, H, W] or [N, H, W, C], not {list(x.shape)}.")
    if y.ndim == 0 or len(x) != len(y):
        raise UserError(f"{where}: {len(x)} images but {y.size if y.ndim == 0 else len(y)} labels.")
    tensor = torch.from_numpy(np.ascontiguousarray(_pixels(x, where)))
    if tensor.ndim == 3:
        tensor = tensor.unsqueeze(1)
    elif tensor.shape[-1] in (1, 3, 4) and tensor.shape[1] not in (1, 3, 4):
        tensor = tensor.permute(0, 3, 1, 2).contiguous()
    if y.dtype.kind == "f":
        return InMemory(tensor, torch.from_numpy(y.astype(np.float32)), classes or [])
    target = torch.from_numpy(y.astype(np.int64))
    low, high = (int(target.min()), int(target.max())) if len(target) else (0, -1)
    if classes is None:
        classes = numbered([high], where)
    if low < 0 or high >= len(classes):
        raise UserError(
            f"{where}: a label is {low if low < 0 else high}, but the {len(classes)} classes are numbered"
            " from 0."
        )
    return InMemory(tensor, target, classes)


def _pixels(x: np.ndarray, where: str) -> np.ndarray:
    """The images as uint8 or float32, in this machine's order of bytes.

    Raises UserError for whole numbers of which it isn't known which is white.
    """
    if x.dtype.kind == "f":
        return x.astype(np.float32)
    if x.dtype.kind == "b":
        return x.astype(np.uint8) * np.uint8(255)
    if x.dtype == np.uint8 or not x.size:
        return x.astype(np.uint8)
    low, high = int(x.min()), int(x.max())
    wide = x.dtype.kind == "u" and x.dtype.itemsize == 2
    if wide and high > 255:
        return x.astype(np.float32) / np.float32(65535)
    if wide or low < 0 or high > 255 or (low, high) == (0, 1):  # a mask would be nearly black
        raise UserError(
            f"{where}: the images are {x.dtype.name} from {low} to {high}, so it isn't known which is white;"
            " store them as uint8 (255 is white), as uint16 (65535), or as floats from 0 to 1."
        )
    return x.astype(np.uint8)


def _from_archive(file: Path, names: tuple[str, str], optional: bool) -> list[np.ndarray]:
    """The arrays of these names in an .npz file; none where they are `optional` and not there."""
    with _errors(file, "data.root"):
        stored = np.load(file, allow_pickle=False)
        if not isinstance(stored, np.lib.npyio.NpzFile):
            raise UserError(
                f"data.root: {file} holds one array and no names; give such files as data.args.images and"
                " data.args.labels."
            )
        with stored:
            if optional and not any(name in stored for name in names):
                return []
            for name in names:
                if name not in stored:
                    raise UserError(f"{file}: has no array '{name}'; it holds {', '.join(stored)}.")
            return [_array(stored[name], f"'{name}'") for name in names]


def _from_file(file: Path) -> np.ndarray:
    with _errors(file, "data.args"):
        stored = np.load(file, allow_pickle=False)
        if isinstance(stored, np.lib.npyio.NpzFile):
            with stored:
                raise UserError(
                    f"data.args: {file} is an .npz file of {', '.join(stored)}; give it as data.root, or"
                    " one array in a .npy file."
                )
        return _array(stored, "it")


def _array(stored: Any, name: str) -> np.ndarray:
    if not isinstance(stored, np.ndarray):  # another file in a zip archive
        raise ValueError(f"{name} is no array")
    return stored


@contextmanager
def _errors(file: Path, where: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{where}: there is no file {file}{near_path(file)}.") from None
    except (OSError, ValueError, EOFError, MemoryError, zlib.error, zipfile.BadZipFile) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{where}: {file} is no NumPy file without objects ({reason}).") from None
