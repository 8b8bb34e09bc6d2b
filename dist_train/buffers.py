"""What a model keeps beside its weights, such as BatchNorm's running averages: over the parts of a step.

In each part a step begins with the same, and what parts made of it is put together in the order of tree.py.
"""

from __future__ import annotations

import torch
from torch import nn

from dist_train.runtime import Runtime
from dist_train.tree import Subtrees, Tensors, sum_over_ranks


class Buffers:
    """The buffers of a model over a step, in which each part begins with those from before it.

    The change of a floating-point one is the mean of the changes that parts made: so BatchNorm's running
    averages are those of all parts. One of whole numbers, such as BatchNorm's counter, is what a rank's first
    part made of it.
    """

    def __init__(self, ranks: Runtime, model: nn.Module) -> None:
        self.ranks = ranks
        self.floats = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        self.others = [buffer for buffer in model.buffers() if not buffer.is_floating_point()]
        self._changes = Subtrees()
        self._last: Tensors = []

    def begin(self, parts: int, skipping: bool) -> None:
        """Keeps what is there before a step of so many parts, if that will be needed."""
        self.several = parts > 1 and bool(self.floats or self.others)
        self._changes.clear()
        self._first: list[torch.Tensor] = []
        if self.several or skipping:
            self._before = _flat(self.floats)
            self._others_before = [buffer.clone() for buffer in self.others]

    def after_part(self, counts: bool, is_last: bool) -> None:
        """Takes up what a part has changed, if it `counts`, and puts all back for the next one."""
        if self.several:  # to enter `no_grad` would cost a small step as much as an operation
            self._take_up(counts, is_last)

    @torch.no_grad()
    def _take_up(self, counts: bool, is_last: bool) -> None:
        if not self._first:
            self._first = [buffer.clone() for buffer in self.others]
        now = _flat(self.floats)
        # What is infinite on purpose, as in a mask, stays so.
        change = torch.where(now == self._before, 0, now - self._before) if counts else torch.zeros_like(now)
        if is_last:
            self._last = self._changes.close([change])
        else:
            self._changes.add([change])
            self.undo()

    def finish(self, counting: int) -> None:
        """After the last part, where so many of all parts did count."""
        if self.several:
            self._put_together(counting)

    @torch.no_grad()
    def _put_together(self, counting: int) -> None:
        change = self._last[0]
        assert change is not None
        if self.ranks.world_size > 1 and len(change):
            change = sum_over_ranks(change, self.ranks.world_size)
        _fill(self.floats, self._before + change / counting)
        if self._first:
            torch._foreach_copy_(self.others, self._first)

    @torch.no_grad()
    def undo(self) -> None:
        """Puts back what was there before the step."""
        _fill(self.floats, self._before)
        if self.others:
            torch._foreach_copy_(self.others, self._others_before)


@torch.no_grad()
def _flat(buffers: list[torch.Tensor]) -> torch.Tensor:
    """All values of some buffers, `[N]`; in the widest of their types."""
    return torch.cat([buffer.flatten() for buffer in buffers]) if buffers else torch.empty(0)


def _fill(buffers: list[torch.Tensor], flat: torch.Tensor) -> None:
    pieces = flat.split([buffer.numel() for buffer in buffers])
    if buffers:
        torch._foreach_copy_(buffers, [p.view_as(b) for p, b in zip(pieces, buffers, strict=True)])
