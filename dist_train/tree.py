"""Sums in one fixed order: a binary tree over numbered terms, whoever adds them up.

Floating-point addition is not associative, so the order is what makes bits. Terms 0, 1, 2, ... are added up
in pairs, then in pairs of pairs; an odd one at the end goes up as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

Tensors = list[torch.Tensor | None]  # None stands for nothing to add

# Its name until torch 2.13, of which later versions warn.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


def tree_sum(terms: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of tensors of one shape."""
    while len(terms) > 1:
        pairs = zip(terms[::2], terms[1::2], strict=False)
        odd = terms[len(terms) // 2 * 2 :]
        terms = [*(left + right for left, right in pairs), *odd]
    return terms[0]


def sum_over_ranks(flat: torch.Tensor, world_size: int) -> torch.Tensor:
    """The sum of every rank's `flat` `[N]`, in the order of ranks, on every rank; perhaps in its memory.

    Each rank adds up one shard of it, then all gather the shards: no more traffic than that of a ring.
    """
    if world_size == 2:  # of two numbers there is one sum, in any order
        dist.all_reduce(flat)
        return flat
    missing = -len(flat) % world_size
    whole = torch.cat([flat, flat.new_zeros(missing)]) if missing else flat
    shards = torch.empty_like(whole)
    dist.all_to_all_single(shards, whole)
    terms = shards.view(world_size, len(shards) // world_size)
    while len(terms) > 1:  # as `tree_sum` does, in the memory of the shards, all pairs by one operation
        terms[: len(terms) // 2 * 2 : 2].add_(terms[1::2])
        terms = terms[::2]
    _all_gather(whole, terms[0])
    return whole[: len(flat)]


class Subtrees:
    """A sum of lists of tensors that come one by one: equal subtrees are merged at once.

    It works as a binary counter, so no more than log2(terms) lists are held, and has the bits of `tree_sum`.
    """

    def __init__(self) -> None:
        self._stack: list[tuple[int, Tensors]] = []  # (level, sum), the largest first

    def __len__(self) -> int:
        return len(self._stack)

    def add(self, term: Tensors) -> None:
        """Adds the next term, whose tensors are the tree's own from now on."""
        level = 0
        while self._stack and self._stack[-1][0] == level:
            term = _added(self._stack.pop()[1], term)
            level += 1
        self._stack.append((level, term))

    def close(self, last: Tensors) -> Tensors:
        """The sum of all terms, of which `last` is the last one; a new tree begins."""
        for subtree in self.smallest_first():
            last = _added(subtree, last)
        self._stack.clear()
        return last

    def smallest_first(self) -> Iterator[Tensors]:
        """The sums of the subtrees that wait for their other half, the latest terms first."""
        return (subtree for _, subtree in reversed(self._stack))

    def clear(self) -> None:
        """Begins a new tree."""
        self._stack.clear()


def add(terms: Sequence[torch.Tensor | None], sums: Sequence[torch.Tensor | None]) -> None:
    """Adds `terms` to `sums`, in the memory of these; what is None on either side is left as it is."""
    both = [(a, b) for a, b in zip(sums, terms, strict=True) if a is not None and b is not None]
    if both:
        torch._foreach_add_([a for a, _ in both], [b for _, b in both])


def _added(left: Tensors, right: Tensors) -> Tensors:
    """The sums of two lists of tensors, in the memory of `left` where there are both."""
    add(right, left)
    return [b if a is None else a for a, b in zip(left, right, strict=True)]
