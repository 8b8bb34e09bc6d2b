"""`dist-train samples`: a picture of training images with class names, before and after augmentation."""

from __future__ import annotations

from pathlib import Path

from dist_train import data
from dist_train.config import Config
from dist_train.data.transforms import ImageTransform
from dist_train.report.pictures import write_grid

COLUMNS = 8


def draw(config: Config, output: Path, count: int = 16) -> None:
    """Writes a PNG with the first `count` samples of the first epoch, as read and as the model sees them."""
    sets = data.build(config)
    indices = sets.sampler(config, 0, 1, 0, 1).order(0)[:count].tolist()
    plain = ImageTransform()
    rows = []
    for first in range(0, len(indices), COLUMNS):
        read, seen = [], []
        for index in indices[first : first + COLUMNS]:
            image, label = sets.train.source[index]
            read.append((plain(image), sets.classes[int(label)] if sets.classes else f"{label}"))
            seen.append((sets.train.sample(index, epoch=0)[0], "augmented"))
        rows += [read, seen]
    write_grid(rows, output)
