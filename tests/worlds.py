"""Small worlds for the tests: data of a few kilobytes, and the arguments of a training on them."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CLASSES = ["bright", "dark", "striped"]

SMALL = [
    "data.name=arrays",
    "data.root=arrays.npz",
    "data.workers=0",
    "optim.lr=0.1",
    "train.batch_size=16",
    "train.steps=12",
    "log.every=4",
    "device=cpu",
    "wandb.mode=disabled",
]


def pictures(count: int, size: int = 8, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """`count` grey images uint8 [N, size, size] of the CLASSES in turn, and labels int64 [N]."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    images = generator.integers(0, 60, (count, size, size))
    images[labels == 0] += 190
    images[labels == 1] += 10
    images[labels == 2, ::2] += 190
    return images.astype(np.uint8), labels.astype(np.int64)


def write_images(folder: Path, count: int, size: int = 8, seed: int = 0) -> list[tuple[Path, str]]:
    """`count` PNG files of the three CLASSES in turn; returns (path, class name) of each."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for number, (image, label) in enumerate(zip(*pictures(count, size, seed), strict=True)):
        path = folder / f"{number:03}.png"
        Image.fromarray(image).convert("RGB").save(path)
        written.append((path, CLASSES[label]))
    return written


def write_npz(folder: Path) -> Path:
    """arrays.npz: 90 training and 37 eval images of 8 x 8 pixels, in 3 learnable classes."""
    x_train, y_train = pictures(90)
    x_test, y_test = pictures(37, seed=1)
    path = folder / "arrays.npz"
    np.savez(path, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    return path


def write_image_folder(folder: Path) -> Path:
    """images/{train,val}/{bright,dark,striped}/*.png: 30 and 12 RGB images of 8 x 8 pixels."""
    top = folder / "images"
    for part, count, seed in (("train", 30, 0), ("val", 12, 1)):
        for path, name in write_images(folder / "loose", count, seed=seed):
            (top / part / name).mkdir(parents=True, exist_ok=True)
            path.rename(top / part / name / path.name)
    (folder / "loose").rmdir()
    return top


def write_csv_data(folder: Path) -> Path:
    """csv/{train.csv,eval.csv,pictures/*.png}: 30 and 12 images, a header, labels by name."""
    top = folder / "csv"
    for part, count, seed in (("train", 30, 0), ("eval", 12, 1)):
        rows = write_images(top / "pictures" / part, count, seed=seed)
        shown = [(f"{part}/{path.name}", name) for path, name in rows]
        write_csv(top / f"{part}.csv", [("file_name", "label"), *shown])
    return top


def write_csv(path: Path, rows: Sequence[Sequence[Any]]) -> Path:
    """A CSV file of these rows."""
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)
    return path


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """{path: (size, mtime in ns)} of all that lies in a folder, to see what changed; but for what Python
    compiles.
    """
    return {
        str(path.relative_to(folder)): (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if "__pycache__" not in path.parts
    }
