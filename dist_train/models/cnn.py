"""Convolutional networks for small images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn


def cnn(
    in_channels: int = 1,
    num_classes: int = 10,
    widths: Sequence[int] = (32, 64, 128),
    dropout: float = 0.0,
    mirror: bool = False,
    shift: int = 0,
) -> nn.Module:
    """A small, fast network: each width halves the image, all but the first with two convolutions.

    `[B, C, H, W]`, H and W at least 2 ** len(widths) -> `[B, K]`. The order of
    convolutions, pooling, BatchNorm and GELU is that of Jordan, 2024 (arXiv:2404.00498).

    Args:
        mirror: whether it gives, in evaluation, the mean for an image and for its mirror image.
        shift: by so many pixels up, down, left and right the image is moved for further terms of this mean.

    Raises ValueError for a negative `shift`.
    """
    if shift < 0:
        raise ValueError(f"shift is a number of pixels from 0 on, not {shift}")
    first = nn.Conv2d(in_channels, widths[0], 4, stride=2, padding=1, bias=False)
    layers: list[nn.Module] = [first, nn.BatchNorm2d(widths[0]), nn.GELU()]
    for before, width in pairwise(widths):
        # Pooling before BatchNorm and GELU: a quarter of their work.
        layers += [_convolution(before, width), nn.MaxPool2d(2), nn.BatchNorm2d(width), nn.GELU()]
        layers += [_convolution(width, width), nn.BatchNorm2d(width), nn.GELU()]
    # Not one mean per channel but nine: where something is tells a sleeve from a collar.
    layers += [_Nine(3), nn.Flatten(), nn.Dropout(dropout)]
    layers.append(nn.Linear(9 * widths[-1], num_classes))
    return Averaged(*layers, mirror=mirror, shift=shift) if mirror or shift else nn.Sequential(*layers)


def resnet18_small(in_channels: int = 3, num_classes: int = 10) -> nn.Module:
    """ResNet-18 for images of 32 x 32: its first convolution is one of 3 x 3 pixels, and nothing is pooled.

    `[B, C, H, W]` -> `[B, K]`. He et al., 2016, who begin so on CIFAR-10.
    """
    from torchvision.models import resnet18  # half a second

    model = resnet18(num_classes=num_classes)
    model.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    return model


class Averaged(nn.Sequential):
    """Layers that give, in evaluation, the mean of their outputs for several views of an image.

    Args:
        mirror, shift: which views: those of `cnn`.
    """

    def __init__(self, *layers: Any, mirror: bool = False, shift: int = 0) -> None:
        super().__init__(*layers)
        self.mirror, self.shift = mirror, shift

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """`[B, C, H, W]` -> `[B, K]`."""
        once = super().forward
        if self.training:
            return once(images)  # type: ignore[no-any-return]
        views = [images, *_moved(images, self.shift)] if self.shift else [images]
        if self.mirror:
            views += [view.flip(-1) for view in views]
        return torch.stack([once(view) for view in views]).mean(0)


def _moved(images: torch.Tensor, by: int) -> list[torch.Tensor]:
    """Images `[B, C, H, W]` moved by so many pixels to each of the four sides; their edge is repeated."""
    height, width = images.shape[-2:]
    padded = nn.functional.pad(images, [by] * 4, mode="replicate")
    corners = ((0, by), (2 * by, by), (by, 0), (by, 2 * by))
    return [padded[..., top : top + height, left : left + width] for top, left in corners]


class _Nine(nn.AdaptiveAvgPool2d):
    """Leaves `[B, C, 3, 3]` as it is: the same numbers, without a backward pass that takes 6 % of a step."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images if images.shape[-2:] == (3, 3) else super().forward(images)


def _convolution(before: int, after: int) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, padding=1, bias=False)
