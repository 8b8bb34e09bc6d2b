"""Batches: what the model gets, as tensors, or tuples and dicts of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from dist_train.config import UserError
from dist_train.data.normalize import Normalization
from dist_train.data.order import Part
from dist_train.nested import map_tensors, tensors


class Batch(NamedTuple):
    """What the model gets, and which part of which step it is.

    Inputs and targets are tensors `[B, ...]`, or tuples, lists and dicts of them at any depth.
    """

    inputs: Any  # of images [B, C, H, W]
    targets: Any  # None where samples are no pairs: then all is in `inputs`
    part: Part
    bad: tuple[tuple[str, str], ...] = ()  # samples that could not be read, and why
    normalize: Normalization | None = None  # what is still to be done to images, on the device

    @property
    def rows(self) -> int:
        """How many samples there are; also one that only fills the part of a rank that was left nothing."""
        if isinstance(self.inputs, torch.Tensor):
            return len(self.inputs)
        return next((len(tensor) for tensor in tensors(self.inputs)), 0)

    def to(self, device: torch.device, channels_last: bool = False) -> Batch:
        """The batch on `device`, normalized; a copy from page-locked memory does not wait."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            if self.normalize is not None:  # a quarter of the bytes is moved
                layout = torch.channels_last if channels_last else torch.contiguous_format
                return self.normalize(tensor.to(device, non_blocking=True), layout)
            layout = torch.channels_last if channels_last and tensor.ndim == 4 else torch.preserve_format
            return tensor.to(device, non_blocking=True, memory_format=layout)

        targets = map_tensors(lambda tensor: tensor.to(device, non_blocking=True), self.targets)
        return Batch(map_tensors(move, self.inputs), targets, self.part, self.bad)


class Unreadable(NamedTuple):
    """Stands where a worker could not read a batch; the error comes up, as it is, where it is used."""

    error: UserError

    def to(self, device: torch.device, channels_last: bool = False) -> Batch:
        """Raises the error."""
        raise self.error
