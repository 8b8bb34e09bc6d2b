"""Parts: the shares that a global batch is cut into for the whole run. Arithmetic only, without torch."""

from __future__ import annotations

from collections.abc import Sequence

from dist_train.config import UserError, counted


def default_parts(wanted: int | None, world_size: int, accumulate: int) -> int:
    """How many parts a new run has: as wanted, or one for each micro-batch of each rank."""
    return wanted or world_size * accumulate


def part_size(batch_size: int, parts: int, world_size: int, accumulate: int) -> int:
    """Samples in a part. Raises UserError, with sizes that divide, if a global batch can't be cut so."""
    if batch_size % parts == 0:
        return batch_size // parts
    lower, upper = batch_size // parts * parts, (batch_size // parts + 1) * parts
    near = f"{lower} or {upper}" if lower else str(upper)
    by, worlds = counted(parts, "part"), ""
    if parts == world_size * accumulate:
        by = f"{counted(world_size, 'process')} x {counted(accumulate, 'accumulation step')}"
        if divisors := [w for w in range(1, batch_size + 1) if batch_size % (w * accumulate) == 0]:
            noun = "process" if divisors == [1] else "processes"
            worlds = f"; with {batch_size} it runs on {_listed(divisors)} {noun}"
    raise UserError(
        f"train.batch_size: the global batch of {batch_size} can't be divided by {by}; use {near}{worlds}."
    )


def parts_per_rank(parts: int, world_size: int) -> int:
    """How many of the parts of a step each rank computes.

    Raises UserError, with the numbers of processes that do, if they can't be shared evenly.
    """
    if parts % world_size == 0:
        return parts // world_size
    fitting = [number for number in range(1, parts + 1) if parts % number == 0]
    raise UserError(
        f"train.parts: a step of this run is cut into {counted(parts, 'part')}, which can be shared by"
        f" {_listed(fitting)} processes, not by {world_size}; or cut it otherwise from here on, as by"
        f" train.parts={world_size}."
    )


def keeps_bits(parts: int, world_size: int) -> bool:
    """Whether so many ranks hold whole subtrees of the parts, and so give the bits of one process."""
    mine = parts // world_size
    return world_size == 1 or mine & (mine - 1) == 0


def _listed(numbers: Sequence[int]) -> str:
    shown = numbers if len(numbers) <= 8 else [*numbers[:8], "..."]
    return ", ".join(map(str, shown))
