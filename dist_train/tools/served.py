"""What an exported program does around its model: bytes to numbers ahead, scores to probabilities behind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dist_train.config import UserError
from dist_train.data import transforms
from dist_train.data.geometry import mode_of

KEY = "data.eval_transform"


class Scores(nn.Module):
    """A model without what it gives beside its scores."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """`[B, ...]` -> `[B, K]`, or what else the model gives; of a dict what it calls `out`."""
        outputs = self.model(inputs)
        scores: torch.Tensor = outputs["out"] if isinstance(outputs, dict) else outputs
        return scores


class Probabilities(nn.Module):
    """A model with what is done to images ahead of it, and to its scores after it.

    `[B, C, H, W]` uint8 -> `[B, K]`, or of a segmentation `[B, K, H, W]`.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self, model: nn.Module, mean: Sequence[float], std: Sequence[float], resized: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.scores, self.resized = Scores(model), resized or nn.Identity()
        self.register_buffer("mean", torch.tensor(list(mean) or [0.0]).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(list(std) or [1.0]).view(-1, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The probabilities of the classes."""
        pixels = self.resized(images.to(torch.float32))
        scores: torch.Tensor = self.scores((pixels * (1 / 255) - self.mean) / self.std)
        return scores.softmax(1)


class Resized(nn.Module):
    """Resize and CenterCrop of images of any size, within a level (of 255) of what they give for bytes.

    Antialiased resizing is linear, and the same for each row and each column: so it is a product with two
    matrices, whose numbers follow from the size of the image by operators that every format has. Pixels
    between are not rounded, so that programs agree.

    Args:
        size: `[height, width]`, or `[shorter side]`.
        crop: `[height, width]` of the middle that is kept.
        mode: bilinear, or bicubic (Keys, 1981, a = -0.5, as Pillow has it).
    """

    def __init__(self, size: Sequence[int], crop: Sequence[int], mode: str) -> None:
        super().__init__()
        self.size, self.crop, self.cubic = list(size), list(crop), mode == "bicubic"

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """`[B, C, H, W]` float32, 0 to 255 -> `[B, C, crop]`."""
        height, width = images.shape[-2:]
        shorter = torch.minimum(_number(height), _number(width))
        rows, columns = self._weights(height, shorter, 0), self._weights(width, shorter, 1)
        across = (images @ columns.T).clamp(0, 255)  # a cubic goes beyond white and black
        return (rows @ across).clamp(0, 255)

    def _weights(self, length: int, shorter: torch.Tensor, axis: int) -> torch.Tensor:
        """What each of `length` pixels weighs in each of those that are kept, `[kept, length]`."""
        kept, old = self.crop[axis], _number(length)
        new = _number(self.size[axis]) if len(self.size) == 2 else (old * self.size[0] / shorter).floor()
        first, scale = ((new - kept) / 2).round(), old / new
        centers = (torch.arange(kept) + first + 0.5) * scale
        away = ((torch.arange(length) + 0.5 - centers[:, None]) / scale.clamp_min(1.0)).abs()
        weights = _cubic(away) if self.cubic else (1 - away).clamp_min(0)
        return weights / weights.sum(1, keepdim=True)


def _number(value: int) -> torch.Tensor:
    return torch.scalar_tensor(value, dtype=torch.float32)  # no size, on which the program would depend


def _cubic(x: torch.Tensor) -> torch.Tensor:
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def resized(names: Sequence[Any]) -> Resized:
    """What `data.eval_transform` does, for images of any size.

    Raises UserError where it is anything but one Resize, to one size or with a CenterCrop behind it.
    """
    built = [transforms.build(name, f"{KEY}[{place}]") for place, name in enumerate(names)]
    if [name for _, name in built] not in (["Resize"], ["Resize", "CenterCrop"]):
        raise UserError(f"{KEY}: --resize takes one Resize into a program, and a CenterCrop; nothing else.")
    resize, *crops = (step for step, _ in built)
    return _of(resize, *crops)


def _of(resize: Any, crop: Any = None) -> Resized:
    mode = mode_of(resize)
    if not mode or resize.max_size is not None or not resize.size:
        raise UserError(f"{KEY}: --resize takes a Resize that is bilinear or bicubic, without a max_size.")
    size = list(resize.size)
    if crop is None and len(size) == 1:
        raise UserError(f"{KEY}: for --resize all images need one size, by two numbers or a CenterCrop.")
    kept = list(crop.size) if crop is not None else size
    if any(one > other for one, other in zip(kept, size * (3 - len(size)), strict=True)):
        raise UserError(f"{KEY}: the CenterCrop to {kept} is larger than what Resize leaves, {size}.")
    return Resized(size, kept, mode)
