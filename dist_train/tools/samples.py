"""`dist-train samples`: a picture of training images with class names, as read and as the model sees them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.tv_tensors import Mask

from dist_train import data
from dist_train.config import Config, UserError
from dist_train.data.masks import painted
from dist_train.data.order import Part
from dist_train.data.samples import Samples
from dist_train.data.transforms import ImageTransform
from dist_train.models import pretrained
from dist_train.tools.pictures import Cell, write_grid

COLUMNS = 8


def draw(config: Config, output: Path, count: int = 16) -> None:
    """Writes a PNG with the first `count` samples of the first epoch, as read and as the model sees them."""
    sets = data.build(pretrained.with_own_transforms(config))
    if (transform := sets.train.transform) is None:
        raise UserError(f"data: the inputs of '{config.data.name}' are no images, so they can't be drawn.")
    indices = sets.order(config).positions(0)[:count]
    final = _transformed(sets.train, indices)
    plain = ImageTransform()
    rows: list[list[Cell]] = []
    for first in range(0, len(indices), COLUMNS):
        read: list[list[Cell]] = []  # of each sample the image, and its mask if it has one
        seen: list[list[Cell]] = []
        for place in range(first, min(first + COLUMNS, len(indices))):
            image, label = sets.train.pair(int(indices[place]))
            transformed, target = final[place]
            read.append([(plain(image), _title(label, sets.classes))])
            seen.append([(transform.normalize.undo(transformed), "as the model sees it")])
            if isinstance(label, Mask):
                read[-1].append((painted(label), _names(label, sets.classes)))
                seen[-1].append((painted(target), _names(target, sets.classes)))
        rows += [list(row) for cells in (read, seen) for row in zip(*cells, strict=True)]
    write_grid(rows, output)


def _transformed(samples: Samples, indices: np.ndarray) -> list[tuple[Any, Any]]:
    """These samples (input, target) as the model sees them in the first epoch, as one batch."""
    if samples.augment is None:  # then they may have various sizes
        return [samples.sample(index, epoch=0) for index in indices.tolist()]
    part = Part(0, 0, indices, len(indices), len(indices))
    batch = samples.augment(samples.batches([part])[0].to(torch.device("cpu")))
    return list(zip(batch.inputs, batch.targets, strict=True))


def _names(mask: torch.Tensor, classes: list[str]) -> str:
    """The classes in a mask, as many as stand above a picture."""
    names = [classes[number] for number in mask.unique().tolist() if 0 < number < len(classes)]
    return ", ".join(names[:2]) + ("..." if len(names) > 2 else "")


def _title(label: Any, classes: list[str]) -> str:
    """The class that a label is the number of; else the label itself, which may be anything."""
    if isinstance(label, Mask):
        return "as it is read"
    value = label.tolist() if hasattr(label, "tolist") else label
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and 0 <= value < len(classes):
        return classes[value]
    return f"{list(label.shape)}" if isinstance(label, torch.Tensor) and label.ndim else str(value)[:20]
