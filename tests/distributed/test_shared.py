"""Ranks of one machine add up in memory that they share, and by gloo where that can't be."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dist_train import fit, load, parallel, shared
from dist_train.shared import share
from dist_train.tree import tree_sum
from tests.distributed.ranks import last, same_bits
from tests.processes import Finished
from tests.worlds import SMALL

SLOT = 2**12  # bytes; so a few numbers take several
F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
SIZES = [
    (1, F32),
    (0, F32),
    (SLOT // 4 + 3, F32),
    (1001, BF16),
    (77, F64),
    (SLOT // 2 + 1, BF16),
    (SLOT, F32),
]


def group() -> Any:
    """This process among others, as far as `share` asks."""
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()

    def gather(value: Any) -> list[Any]:
        values = [None] * world_size
        dist.all_gather_object(values, value)
        return values

    return SimpleNamespace(
        rank=rank,
        world_size=world_size,
        local_world_size=world_size,
        device=torch.device("cpu"),
        gather=gather,
    )


def numbers(step: int, rank: int) -> list[torch.Tensor]:
    """What a rank adds in a step: of all sizes, whose sum depends on the order."""
    draw = torch.Generator().manual_seed(1000 * step + rank)
    return [(torch.randn(size, generator=draw) * 10.0 ** (rank % 4)).to(kind) for size, kind in SIZES]


def add_in_many_steps() -> None:
    """Adds up, while some ranks come late and some leave late."""
    torch.set_num_threads(1)
    shared.SLOT = SLOT
    ranks = group()
    memory = share(ranks)
    assert memory is not None
    wait = random.Random(ranks.rank)
    for step in range(30):
        mine = numbers(step, ranks.rank)
        time.sleep(wait.choice([0, 0, 0.01]))
        memory.add(mine)
        for place, found in enumerate(mine):
            expected = tree_sum([numbers(step, rank)[place] for rank in range(ranks.world_size)])
            assert torch.equal(found, expected), (step, place)
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 3, 4, 7])
def test_sums_have_the_bits_of_the_tree_whoever_is_late(
    ranks: Callable[..., list[Finished]], world_size: int
) -> None:
    for rank in ranks(world_size, add_in_many_steps):
        assert rank.rc == 0, rank.err


def train_without(what: str, *words: str) -> None:
    """Trains, where rank 1 has no memory to share, or can't open that of others; nothing stays mapped."""
    refused, opening = os.environ["RANK"] == "1" and what, os.open

    def no_file(name: str) -> int:
        raise OSError(24, "too many files")

    def opened(path: Any, *flags: Any, **more: Any) -> int:
        if str(path).startswith("/proc/"):
            raise PermissionError(13, "not this one")
        return opening(path, *flags, **more)

    if refused == "memory":
        os.memfd_create = no_file  # type: ignore[assignment]
    if refused == "look":
        os.open = opened
    used: list[bool] = []
    parallel.share = lambda ranks: used.append(bool(given := share(ranks))) or given  # type: ignore[func-returns-value]
    fit(load([], words))
    print(f"shared: {used}; left: {'memfd:sums' in Path('/proc/self/maps').read_text()}")


@pytest.mark.parametrize("what", ["", "memory", "look"])
def test_where_one_rank_cannot_share_all_add_up_by_gloo_to_the_same_bits(
    ranks: Callable[..., list[Finished]], here: Callable[..., Any], npz: Path, tmp_path: Path, what: str
) -> None:
    words = [*SMALL, "train.parts=2"]
    here(*words, "run.name=alone")
    for rank in ranks(2, train_without, what, *words, "run.name=two"):
        assert rank.rc == 0, rank.err
        assert f"shared: {[not what]}; left: False" in rank.out, rank
    assert same_bits(last(tmp_path, "alone"), last(tmp_path, "two"))
