"""Crops, flips and sizes of images, by numbers that are drawn ahead: torchvision's, without its generator.

torchvision's random transforms draw from one global generator, so they can be repeated in one thread only.
Here a transform is a function of images and of the numbers of each; many threads may work at once, and
whole batches where images have one size. Pixels are resized by `F.interpolate` itself, in uint8 on any
machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

TRIES = 10  # boxes that RandomResizedCrop draws until one fits


class Step(NamedTuple):
    """A transform of images `[B, C, H, W]`, by `draws` numbers from 0 to below 1 for each, `[B, draws]`.

    It is sent to worker processes where they are not forked.
    """

    draws: int
    apply: Callable[[torch.Tensor, np.ndarray], torch.Tensor]


def step(name: str, transform: Any) -> Step | None:
    """What does the same as a transform of torchvision.transforms.v2; None where we don't do it."""
    if name == "Resize" and (mode := mode_of(transform)):
        return Step(0, partial(_resized, size=transform.size, longest=transform.max_size, mode=mode))
    if name == "RandomResizedCrop" and (mode := mode_of(transform)):
        box = partial(resized_box, scale=transform.scale, ratio=transform.ratio)
        return Step(2 * TRIES + 2, partial(_resized_crop, box=box, size=transform.size, mode=mode))
    if name == "RandomCrop" and transform.padding_mode == "constant" and _is_number(transform.fill):
        return Step(2, partial(_crop, transform=transform))
    if name == "RandomHorizontalFlip":
        return Step(1, partial(_flip, dim=-1, p=transform.p))
    if name == "RandomVerticalFlip":
        return Step(1, partial(_flip, dim=-2, p=transform.p))
    return None


def as_batch(image: torch.Tensor) -> torch.Tensor:
    """A view of one image `[C, H, W]` as a batch `[1, C, H, W]`.

    Of one in memory `[H, W, C]` torch sees then that it is channels-last: it takes two thirds of the time.
    """
    return image.permute(1, 2, 0)[None].permute(0, 3, 1, 2)


def stack(images: Sequence[torch.Tensor]) -> torch.Tensor:
    """Images `[C, H, W]` as a batch `[B, C, H, W]`, channels-last."""
    return torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)


def resize(
    images: torch.Tensor, size: Sequence[int] | None, longest: int | None = None, mode: str = "bilinear"
) -> torch.Tensor:
    """Images `[B, C, H, W]` in the size `[height, width]`, or `[shorter side]`, antialiased.

    Args:
        longest: the longer side is at most this; without a `size` it is this.
    """
    height, width = images.shape[-2:]
    if size is None or len(size) == 1:
        short, long = sorted((height, width))
        if size:
            short, long = size[0], int(size[0] * long / short)
        if longest is not None and (long > longest or not size):
            short, long = int(longest * short / long), longest
        size = [short, long] if height <= width else [long, short]
    return _interpolate(images, size, mode)


def resized_box(
    height: int, width: int, drawn: Sequence[float], scale: Sequence[float], ratio: Sequence[float]
) -> tuple[int, int, int, int]:
    """A box `(top, left, height, width)` of random area and shape in an image, as RandomResizedCrop has it.

    Of "Going Deeper with Convolutions" (Szegedy et al., CVPR 2015); the numbers are 10 pairs of an area and
    a ratio, of which the first that fits is taken, and the place.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for number in range(TRIES):
        area = height * width * (scale[0] + drawn[2 * number] * (scale[1] - scale[0]))
        aspect = math.exp(low + drawn[2 * number + 1] * (high - low))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(drawn[-2] * (height - h + 1)), int(drawn[-1] * (width - w + 1)), h, w
    h, w = height, width  # the whole image, or its middle where its shape is too long
    if width < min(ratio) * height:
        h = round(width / min(ratio))
    elif width > max(ratio) * height:
        w = round(height * max(ratio))
    return (height - h) // 2, (width - w) // 2, h, w


def _resized(images: torch.Tensor, drawn: np.ndarray, **how: Any) -> torch.Tensor:
    return resize(images, **how)


def _resized_crop(
    images: torch.Tensor,
    drawn: np.ndarray,
    box: Callable[..., tuple[int, int, int, int]],
    size: Sequence[int],
    mode: str,
) -> torch.Tensor:
    height, width = images.shape[-2:]
    rows = []
    for row, numbers in enumerate(drawn.tolist()):
        top, left, h, w = box(height, width, numbers)
        rows.append(_interpolate(images[row : row + 1, :, top : top + h, left : left + w], size, mode))
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _crop(images: torch.Tensor, drawn: np.ndarray, transform: Any) -> torch.Tensor:
    left, right, top, bottom = transform.padding or (0, 0, 0, 0)
    h, w = transform.size
    if transform.pad_if_needed:
        more_h = max(0, h - (images.shape[-2] + top + bottom))
        more_w = max(0, w - (images.shape[-1] + left + right))
        left, right, top, bottom = left + more_w, right + more_w, top + more_h, bottom + more_h
    images = F.pad(images, (left, right, top, bottom), value=_number(transform.fill))
    height, width = images.shape[-2:]
    if height < h or width < w:
        raise ValueError(f"the crop of {(h, w)} is larger than the image with its padding, {(height, width)}")
    places = (drawn * [height - h + 1, width - w + 1]).astype(int).tolist()
    rows = [images[row, :, y : y + h, x : x + w] for row, (y, x) in enumerate(places)]
    return rows[0][None] if len(rows) == 1 else torch.stack(rows)


def _flip(images: torch.Tensor, drawn: np.ndarray, dim: int, p: float) -> torch.Tensor:
    chosen = drawn[:, 0] < p
    if len(chosen) == 1:
        return images.flip(dim) if chosen[0] else images
    return torch.where(torch.from_numpy(chosen)[:, None, None, None], images.flip(dim), images)


def _interpolate(images: torch.Tensor, size: Sequence[int], mode: str) -> torch.Tensor:
    if list(images.shape[-2:]) == list(size):
        return images
    if images.dtype != torch.uint8 and not images.is_floating_point():
        return _interpolate(images.float(), size, mode).round().to(images.dtype)
    return F.interpolate(images, size=list(size), mode=mode, antialias=True)


def mode_of(transform: Any) -> str:
    """The interpolation by its name, if it is one that antialiases whole numbers; else an empty text."""
    name = getattr(transform.interpolation, "value", transform.interpolation)
    name = {2: "bilinear", 3: "bicubic"}.get(name, name)  # Pillow's numbers
    return str(name) if transform.antialias and name in ("bilinear", "bicubic") else ""


def _number(fill: Any) -> Any:
    """What an image is filled with; masks may have a number of their own."""
    return fill.get("others") if isinstance(fill, dict) else fill


def _is_number(fill: Any) -> bool:
    return isinstance(_number(fill), (int, float))
