"""Convolutional networks for small images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn


def cnn(
    in_channels: int = 1,
    num_classes: int = 10,
    widths: Sequence[int] = (32, 64, 128),
    dropout: float = 0.0,
    mirror: bool = False,
) -> nn.Module:
    """A small, fast network: each width halves the image, all but the first with two convolutions.

    `[B, C, H, W]`, H and W at least 2 ** len(widths) -> `[B, K]`. The order of
    convolutions, pooling, BatchNorm and GELU is that of Jordan, 2024 (arXiv:2404.00498).

    Args:
        mirror: whether it gives, in evaluation, the mean for an image and for its mirror image.
    """
    first = nn.Conv2d(in_channels, widths[0], 4, stride=2, padding=1, bias=False)
    layers: list[nn.Module] = [first, nn.BatchNorm2d(widths[0]), nn.GELU()]
    for before, width in pairwise(widths):
        # Pooling before BatchNorm and GELU: a quarter of their work.
        layers += [_convolution(before, width), nn.MaxPool2d(2), nn.BatchNorm2d(width), nn.GELU()]
        layers += [_convolution(width, width), nn.BatchNorm2d(width), nn.GELU()]
    # Not one mean per channel but nine: where something is tells a sleeve from a collar.
    layers += [nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Dropout(dropout)]
    layers.append(nn.Linear(9 * widths[-1], num_classes))
    return Mirrored(*layers) if mirror else nn.Sequential(*layers)


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


class Mirrored(nn.Sequential):
    """Layers that give, in evaluation, the mean of their outputs for an image and for its mirror image."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """`[B, C, H, W]` -> `[B, K]`."""
        outputs: torch.Tensor = super().forward(images)
        return outputs if self.training else (outputs + super().forward(images.flip(-1))) / 2


def _convolution(before: int, after: int) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, padding=1, bias=False)
