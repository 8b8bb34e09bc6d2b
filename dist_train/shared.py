"""Sums over the ranks of one machine, on the CPU, by memory that they share.

Through gloo's sockets the same numbers are copied several times, by CPUs that could train meanwhile. Here
gloo only tells that all ranks have written: so a rank that is gone, or late, is noticed as in any other sum.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress

import torch
import torch.distributed as dist

from dist_train.runtime import Runtime
from dist_train.tree import tree_sum

SLOT = 2**22  # bytes of each rank that are added up at a time: they stay in the CPU's cache
ALIGNED = 64  # bytes, at a multiple of which a tensor begins
MARK = 16  # random bytes by which a memory is known


class Shared:
    """What the ranks of one machine add up in.

    Each rank has two slots and uses them in turn. When it writes to one again, it has met all others in the
    other one, so they have read what was there.

    Args:
        memories: of each rank, uint8 `[2, SLOT]`.
        rank: this one's.
    """

    def __init__(self, memories: list[torch.Tensor], rank: int) -> None:
        self.memories, self.rank, self.world_size = memories, rank, len(memories)
        self._turn = 0
        self._nothing = torch.zeros(1)

    def add(self, flats: Iterable[torch.Tensor]) -> None:
        """Puts into each tensor `[N]` its sum over all ranks, in the order of `tree_sum`.

        All ranks come here together, with tensors of the same sizes and types.
        """
        for pieces in _packed(flats):
            self._turn = 1 - self._turn
            self._add(pieces)

    def _add(self, pieces: list[torch.Tensor]) -> None:
        of_ranks = [_placed(memory[self._turn], pieces) for memory in self.memories]
        torch._foreach_copy_(of_ranks[self.rank], pieces)
        self._meet()
        terms: list[tuple[torch.Tensor, ...]] = list(zip(*of_ranks, strict=True))
        if self.world_size == 2:
            for piece, (first, second) in zip(pieces, terms, strict=True):
                torch.add(first, second, out=piece)
            return
        # Each rank adds up a share, in its own slot, where no other one reads that share until all meet.
        shares = [[term.tensor_split(self.world_size) for term in of_piece] for of_piece in terms]
        for of_piece in shares:
            own = [of_rank[self.rank] for of_rank in of_piece]
            own[self.rank].copy_(tree_sum(own))
        self._meet()
        for piece, of_piece in zip(pieces, shares, strict=True):
            torch.cat([of_rank[rank] for rank, of_rank in enumerate(of_piece)], out=piece)

    def _meet(self) -> None:
        dist.all_reduce(self._nothing)


def share(ranks: Runtime) -> Shared | None:
    """Memory that all ranks share; None where they don't compute on the CPUs of one Linux machine.

    All ranks come here together. The memory has no name, and is gone with the last of them. Source:
    memfd_create(2).
    """
    one_machine = 1 < ranks.world_size == ranks.local_world_size
    if not one_machine or ranks.device.type != "cpu" or not hasattr(os, "memfd_create"):
        return None
    mark, file = os.urandom(MARK), -1
    with suppress(OSError):  # a limit: then nobody finds such a file
        file = os.memfd_create("sums")
        os.ftruncate(file, 2 * SLOT)
        os.pwrite(file, mark, 0)
    files = ranks.gather((os.getpid(), file, mark))
    memories: list[torch.Tensor] = []
    with suppress(OSError, ValueError):  # ranks that see another /proc, or may not look into each other
        memories = [_opened(*one) for one in files]
    all_there = all(ranks.gather(bool(memories)))  # by then nobody needs this process for it
    if file >= 0:
        os.close(file)
    return Shared(memories, ranks.rank) if all_there else None


def _opened(process: int, file: int, mark: bytes) -> torch.Tensor:
    """A rank's memory. Raises OSError or ValueError if that process has no such file, or is another one."""
    opened = os.open(f"/proc/{process}/fd/{file}", os.O_RDWR)
    try:
        if os.pread(opened, MARK, 0) != mark:
            raise ValueError("another process, of another machine, has this number here")
        return torch.frombuffer(mmap.mmap(opened, 2 * SLOT), dtype=torch.uint8).view(2, SLOT)
    finally:
        os.close(opened)


def _packed(flats: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Pieces of tensors, in their order, as many at a time as a slot holds."""
    pieces: list[torch.Tensor] = []
    room = SLOT
    for flat in flats:
        for piece in flat.split(SLOT // flat.itemsize):
            if piece.nbytes > room:
                yield pieces
                pieces, room = [], SLOT
            pieces.append(piece)
            room -= _space(piece)
    if pieces:
        yield pieces


def _placed(slot: torch.Tensor, pieces: list[torch.Tensor]) -> list[torch.Tensor]:
    """Where pieces lie in a slot, as tensors of their sizes and types."""
    places, start = [], 0
    for piece in pieces:
        places.append(slot[start : start + piece.nbytes].view(piece.dtype))
        start += _space(piece)
    return places


def _space(piece: torch.Tensor) -> int:
    """Bytes that a piece takes in a slot."""
    return -(-piece.nbytes // ALIGNED) * ALIGNED
