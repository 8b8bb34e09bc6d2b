"""Pixels to numbers: what is done last to an image, on the device where whole batches come there as uint8."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch

from dist_train.config import UserError, counted


class Normalization(NamedTuple):
    """Images `[..., C, H, W]` to float32: values from 0 to 1, less a mean, divided by a deviation.

    Both have a value for each channel, or one for all; without values only the first is done.
    """

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __call__(self, image: Any, layout: torch.memory_format = torch.preserve_format) -> torch.Tensor:
        """One image or a batch, normalized, on its device; in memory as `layout` says."""
        tensor = unit(image, layout)
        if not self.mean:
            return tensor
        if len(self.mean) not in (1, tensor.shape[-3]):
            raise UserError(
                f"data.mean has {counted(len(self.mean), 'value')}, but the images have"
                f" {counted(tensor.shape[-3], 'channel')}."
            )
        mean, std = _on(tensor.device, self.mean), _on(tensor.device, self.std)
        is_new = isinstance(image, torch.Tensor) and image.dtype != torch.float32  # so nobody else has it
        return (tensor.sub_(mean) if is_new else tensor - mean).div_(std)

    def undo(self, tensor: torch.Tensor) -> torch.Tensor:
        """Values from 0 to 1 again, to be looked at."""
        if not self.mean:
            return tensor
        return tensor * _on(tensor.device, self.std) + _on(tensor.device, self.mean)


@cache
def _on(device: torch.device, values: tuple[float, ...]) -> torch.Tensor:
    """A value for each channel, `[C, 1, 1]`; copied to a device once, as the copy would wait for it."""
    return torch.tensor(values, device=device).view(-1, 1, 1)


def unit(image: Any, layout: torch.memory_format = torch.preserve_format) -> torch.Tensor:
    """Values from 0 to 1 as float32; what is float already is taken as it is.

    Raises UserError for a type of pixels whose white isn't known.
    """
    tensor = as_tensor(image).as_subclass(torch.Tensor)
    white = {torch.uint8: 255, torch.uint16: 65535}.get(tensor.dtype)
    if white is None and not tensor.is_floating_point() and tensor.dtype != torch.bool:
        raise UserError(
            f"data: an image is of type {str(tensor.dtype).removeprefix('torch.')}, so it isn't known"
            " which value is white; make it uint8 (255), uint16 (65535), or floats from 0 to 1."
        )
    tensor = tensor.to(torch.float32, memory_format=layout)
    return tensor if white is None else tensor.mul_(1 / white)


def as_tensor(image: Any) -> torch.Tensor:
    """An image of any kind as a tensor `[C, H, W]`. Raises UserError for what is none."""
    if isinstance(tensor := from_array(image), torch.Tensor):
        return tensor
    from torchvision.transforms.v2.functional import to_image

    try:
        return to_image(image)  # type: ignore[no-any-return]
    except TypeError:
        raise UserError(
            f"data: an image is of type {type(image).__name__}; make it a tensor, an array or a PIL image."
        ) from None


def from_array(image: Any) -> Any:
    """An array `[H, W]` or `[H, W, C]` as a tensor `[C, H, W]`; all else is given back."""
    if not isinstance(image, np.ndarray):
        return image
    from torchvision.transforms.v2.functional import to_image

    return to_image(image.astype(image.dtype.newbyteorder("="), copy=False))
