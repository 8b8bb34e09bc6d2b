"""Images with a mask each, in which every pixel is the number of a class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import Dataset

from dist_train.config import UserError
from dist_train.data.images import (
    EVAL_FOLDERS,
    BadSample,
    as_text,
    image_paths,
    near_path,
    packed,
    read_image,
    unpacked,
)

if TYPE_CHECKING:
    from PIL import Image
    from torchvision.tv_tensors import Mask

IGNORED = 255  # pixels of this number count nowhere


class ImageMasks(Dataset[Any]):
    """Image files with a mask file each, decoded when they are read."""

    def __init__(
        self, images: Sequence[Path], masks: Sequence[Path], classes: Sequence[str], channels: int = 3
    ) -> None:
        self.images, self.masks = packed(images), packed(masks)
        self.classes, self.channels = list(classes), channels
        self.shorter: int | None = None  # as of ImageFiles, but that masks are kept as large as they are
        self.note = ""

    def __len__(self) -> int:
        return len(self.images)

    def path(self, index: int) -> Path:
        """The image file of a sample."""
        return unpacked(self.images[index])

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Mask]:
        """An image uint8 `[C, H, W]` and its mask uint8 `[H, W]`. Raises BadSample where they don't fit."""
        from torchvision.tv_tensors import Mask

        image = read_image(self.path(index), self.channels)
        mask = read_mask(path := unpacked(self.masks[index]), len(self.classes))
        if mask.shape != image.shape[1:]:
            sizes = f"{list(mask.shape)}, but its image {list(image.shape[1:])}"
            raise BadSample(f"{as_text(path)}: the mask is of size {sizes}.")
        return image, Mask(mask)


def image_masks(
    root: str | None = None,
    train: bool = True,
    classes: list[str] | None = None,
    images: str = "images",
    masks: str = "masks",
    channels: int = 3,
) -> ImageMasks | None:
    """Images and masks of the same names in `root`/train/images and `root`/train/masks, and so in `root`/val
    (or eval, test); or right under `root`.

    A mask is a PNG file, grey or with a palette, whose pixels are the numbers of `classes`; 255 is ignored.
    """
    if not root:
        raise UserError("data.root: image_masks needs the folder of the images and masks.")
    if not classes:
        raise UserError("data.args.classes: image_masks needs the names of the classes, by their numbers.")
    top = Path(root)
    if not top.is_dir():
        raise UserError(f"data.root: there is no folder {top}{near_path(top)}.")
    part = top / "train" if (top / "train").is_dir() else top
    if not train:
        found = [top / name for name in EVAL_FOLDERS if (top / name).is_dir()] if part != top else []
        if not found:
            return None
        part = found[0]
    for key, name in (("images", images), ("masks", masks)):
        if not (part / name).is_dir():
            raise UserError(f"data.args.{key}: there is no folder {part / name}{near_path(part / name)}.")
    files = image_paths(part / images)
    if not files:
        raise UserError(f"{part / images}: holds no images.")
    present = {path for path in image_paths(part / masks) if path.suffix.lower() == ".png"}
    pairs = [(file, part / masks / file.relative_to(part / images).with_suffix(".png")) for file in files]
    for file, mask in pairs:
        if mask not in present:
            raise UserError(f"{as_text(file)}: has no mask; there is no {as_text(mask)}{near_path(mask)}.")
    return ImageMasks(files, [mask for _, mask in pairs], [str(name) for name in classes], channels)


def read_mask(path: Path, classes: int) -> torch.Tensor:
    """A mask file as uint8 `[H, W]`. Raises BadSample if it is none, or has numbers of no class."""
    from PIL import Image

    shown = as_text(path)
    try:
        with Image.open(path) as image:
            mode, values = image.mode, np.array(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadSample(f"{shown}: not a readable mask ({reason}).") from None
    if mode not in ("L", "P", "1"):
        raise BadSample(
            f"{shown}: a mask has one number of 8 bits for each pixel (grey or with a palette), not {mode}."
        )
    wrong = values[(values >= classes) & (values != IGNORED)]
    if wrong.size:
        raise BadSample(
            f"{shown}: a pixel is {int(wrong.max())}, but the {classes} classes are numbered from 0, and"
            f" {IGNORED} is ignored."
        )
    return torch.from_numpy(values.astype(np.uint8))


def colors() -> np.ndarray:
    """A color for each number, uint8 `[256, 3]`: those of PASCAL VOC's masks (Everingham et al., 2010)."""
    numbers, found = np.arange(256), np.zeros((256, 3), np.int64)
    for bit in range(8):
        for channel in range(3):
            found[:, channel] |= (numbers >> (3 * bit + channel) & 1) << (7 - bit)
    return found.astype(np.uint8)


def painted(mask: torch.Tensor) -> torch.Tensor:
    """A mask `[H, W]` as an image to look at, `[3, H, W]` with values from 0 to 1."""
    return torch.from_numpy(colors())[mask.long()].permute(2, 0, 1) / 255


def mask_file(mask: np.ndarray) -> Image.Image:
    """A mask uint8 `[H, W]` as a picture that keeps the numbers, and that viewers show in colors."""
    from PIL import Image

    image = Image.fromarray(mask)
    image.putpalette(colors().tobytes())
    return image
