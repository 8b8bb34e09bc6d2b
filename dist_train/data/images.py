"""The two kinds of data set that our sources make: images held in memory, and image files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms import v2

from dist_train.config import UserError


class BadSample(UserError):
    """A sample that is missing or no readable image."""


class InMemory(Dataset):
    """Images `[N, C, H, W]` (uint8, or float) and labels `[N, ...]` held as two tensors."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, classes: Sequence[str]) -> None:
        self.images, self.labels, self.classes = images, labels, list(classes)
        self.note = ""  # what the user should know about where the data came from

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Any]:
        return self.images[index], self.labels[index]


class ImageFiles(Dataset):
    """Image files with a label each, decoded when they are read."""

    def __init__(
        self,
        paths: Sequence[Path],
        labels: Sequence[Any],
        classes: Sequence[str],
        channels: int = 3,
    ) -> None:
        # One array of bytes for all paths: a list of millions of objects would be copied into
        # each worker as soon as reference counts are touched.
        self.paths = np.array([str(path) for path in paths], dtype=np.bytes_)
        self.labels = np.asarray(labels)
        self.classes, self.channels = list(classes), channels

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> Path:
        """The file of a sample."""
        return Path(self.paths[index].decode())

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Any]:
        return read_image(self.path(index), self.channels), self.labels[index].item()


def read_image(path: Path, channels: int = 3) -> torch.Tensor:
    """An image file as uint8 `[C, H, W]`. Raises BadSample, naming the file, if it is no image."""
    try:
        with Image.open(path) as image:
            return v2.functional.pil_to_tensor(image.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels]))
    except FileNotFoundError:
        raise BadSample(f"{path}: there is no such image file.") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadSample(f"{path}: not a readable image ({reason}).") from None
