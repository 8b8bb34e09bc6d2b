"""Tensors of which each rank holds some rows: which ones, and these rows alone."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from dist_train.config import UserError


class Held(NamedTuple):
    """What this rank holds of a tensor."""

    values: torch.Tensor
    first: int | None  # the row of the whole tensor that is its first; None: it holds all
    is_first: bool  # whether no rank before it holds the same


def is_sharded(tensor: Any) -> bool:
    """Whether it is a DTensor, which is not imported for that: it takes a while."""
    return hasattr(tensor, "to_local")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's rows, in the memory of the tensor; the tensor itself, if it isn't sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined, no-any-return]


def held(tensor: torch.Tensor, name: str = "tensor") -> Held:
    """What this rank holds of a tensor. Raises UserError for one that is cut otherwise than by rows."""
    if not is_sharded(tensor):
        return Held(tensor, None, True)
    from torch.distributed.tensor import DTensor, Shard

    assert isinstance(tensor, DTensor)
    mesh, first, is_first = tensor.device_mesh, None, True
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise UserError(f"{name} is spread over some of the ranks; only what all of them share can be saved.")
    for size, placement, here in zip(mesh.shape, tensor.placements, coordinate, strict=True):
        if placement.is_replicate():
            is_first &= here == 0
        elif type(placement) is Shard and placement.dim == 0 and first is None:
            first = min(here * -(-tensor.shape[0] // size), tensor.shape[0])  # as torch.chunk cuts it
        else:
            raise UserError(f"{name} is spread as {tensor.placements}; only one cut by rows can be saved.")
    return Held(tensor.to_local().detach(), first, is_first)


def rows_of(tensor: torch.Tensor) -> tuple[int, int]:
    """The first row that this rank holds, and how many it holds; a tensor without dimensions has one."""
    values, first, _ = held(tensor)
    return first or 0, values.shape[0] if values.ndim else 1
