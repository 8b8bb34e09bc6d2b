"""The two kinds of data set that our sources make: images held in memory, and image files."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from dist_train.config import UserError, nearest
from dist_train.data.decode import decode_jpeg
from dist_train.data.geometry import as_batch, resize

EVAL_FOLDERS = ("val", "eval", "test", "valid", "validation")
EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's word for so many channels


class BadSample(UserError):
    """A sample that is missing or no readable image."""

    lost = 1  # so many samples in a row may be unreadable for the same reason,
    whole = ""  # which are those of the file of this name


class InMemory(Dataset):
    """Images `[N, C, H, W]` (uint8, or float) and labels `[N, ...]` held as two tensors."""

    in_threads = True

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, classes: Sequence[str]) -> None:
        self.images, self.labels, self.classes = images, labels, list(classes)
        self.note = ""  # what the user should know about where the data came from

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Any]:
        return self.images[index], self.labels[index]

    def all_labels(self) -> torch.Tensor:
        """The labels `[N, ...]` of all samples."""
        return self.labels

    def read_many(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images `[B, C, H, W]` and labels `[B, ...]` of the samples `index` `[B]`."""
        # index_select copies whole images; self.images[index] goes byte by byte, at ten times the cost.
        return self.images.index_select(0, index), self.labels.index_select(0, index)


class ImageFiles(Dataset):
    """Image files with a label each, decoded when they are read."""

    in_threads = True

    def __init__(
        self,
        paths: Sequence[Path],
        labels: Sequence[Any],
        classes: Sequence[str],
        channels: int = 3,
    ) -> None:
        self.paths = packed(paths)
        self.labels = np.asarray(labels)
        self.classes, self.channels = list(classes), channels
        self.shorter: int | None = None  # how many pixels the shorter side of an image has at most
        self.note = ""

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> Path:
        """The file of a sample."""
        return unpacked(self.paths[index])

    def all_labels(self) -> torch.Tensor:
        """The labels `[N, ...]` of all samples."""
        return torch.as_tensor(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Any]:
        image = read_image(self.path(index), self.channels)
        return shrunk(image, self.shorter), self.labels[index].item()


def packed(paths: Sequence[Path]) -> np.ndarray:
    """All paths as one array of bytes.

    A list of millions of objects would be copied into each worker as soon as reference counts are touched.
    """
    return np.array([os.fsencode(path) for path in paths], dtype=np.bytes_)


def unpacked(path: bytes) -> Path:
    """A path that `packed` has packed."""
    return Path(os.fsdecode(path))


def read_image(path: Path, channels: int = 3) -> torch.Tensor:
    """An image file as uint8 `[C, H, W]`; 16-bit and floating-point grey ones as float32 from 0 to 1.

    Raises BadSample, naming the file, if it is no image, or none whose white is known.
    """
    shown = as_text(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise BadSample(f"{shown}: there is no such image file.") from None
    except OSError as error:
        raise _bad(shown, error) from None
    return decode(data, shown, channels)


def decode(data: bytes, shown: str, channels: int = 3) -> torch.Tensor:
    """The same of the bytes of a file that has the name `shown` in messages."""
    from PIL import Image

    if channels not in MODES:
        raise UserError(f"{shown}: an image file is read with 1, 3 or 4 channels, not {channels}.")
    try:
        pixels = decode_jpeg(bytearray(data), channels)
        if pixels is not None:
            return pixels
        with Image.open(io.BytesIO(data)) as image:
            if image.mode == "F" or image.mode.startswith("I"):
                return _deep(image, channels)
            if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
                image = image.convert("RGBA")
            values = np.array(image.convert(MODES[channels]))
            return torch.from_numpy(values.reshape(*values.shape[:2], channels)).permute(2, 0, 1)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _bad(shown, error) from None


def _bad(shown: str, error: Exception) -> BadSample:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    reason = reason.partition(" <")[0]  # not where in memory it is
    return BadSample(f"{shown}: not a readable image ({reason}).")


def shrunk(image: torch.Tensor, shorter: int | None) -> torch.Tensor:
    """An image `[C, H, W]` with at most so many pixels on its shorter side."""
    if shorter is None or min(image.shape[-2:]) <= shorter:
        return image
    return resize(as_batch(image), [shorter])[0]


def _deep(image: Any, channels: int) -> torch.Tensor:
    """A grey image of more than 8 bits as float32 `[C, H, W]` from 0 to 1; Pillow would cut it at 255.

    Raises ValueError where it isn't known which value is white.
    """
    values = np.asarray(image).astype(np.float32)
    if image.mode == "F":
        if not ((values >= 0) & (values <= 1)).all():
            raise ValueError("its floating-point values are not from 0 to 1")
    elif image.mode == "I" and image.format not in ("PNG", "PPM"):  # which older Pillows widen to 32 bits
        raise ValueError("for 32-bit whole numbers it isn't known which is white; save it with 8 or 16 bits")
    else:
        values /= 65535
    grey = torch.from_numpy(values).unsqueeze(0)
    return torch.cat([grey] * min(channels, 3) + [torch.ones_like(grey)] * (channels == 4))


def image_paths(folder: Path) -> list[Path]:
    """All image files below a folder, in the order of their names; what is hidden is left out."""
    found: list[Path] = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not is_hidden(name)]
        shown = (name for name in names if name.lower().endswith(EXTENSIONS) and not is_hidden(name))
        found += map(Path(place).joinpath, shown)
    return sorted(found)


def as_text(path: Path | str | bytes) -> str:
    """A path for messages and records: of its bytes those that are no UTF-8 are escaped."""
    return os.fsencode(path).decode(errors="backslashreplace")


def is_hidden(name: str) -> bool:
    """Whether a file or folder is not the user's own, such as .ipynb_checkpoints or a thumbnail's."""
    return name.startswith(".") or name in ("@eaDir", "__MACOSX")


def near_path(path: Path) -> str:
    """` (did you mean 'x'?)`, the name nearest to that of `path` in its folder, or an empty text."""
    try:
        return nearest(path.name, [item.name for item in path.parent.iterdir()][:10_000])
    except OSError:
        return ""
