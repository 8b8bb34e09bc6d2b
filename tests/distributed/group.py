"""Functions of a test on several ranks: forked processes that join a gloo group."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.processes import environment, finish, world
from tests.warm import Process


class Group:
    """This process among the others, as dist_train.runtime has it."""

    def __init__(self) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value on every rank."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, value: Any) -> Any:
        """Rank 0's value on every rank."""
        return self.gather(value)[0]


def on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any, cwd: Path) -> list[int]:
    """Calls function(group, *arguments) in the folder `cwd` on so many ranks; returns their exit codes.

    The function is one of a module, since the processes import it. What they say is printed.
    """
    outputs = [cwd / f"rank{rank}.txt" for rank in range(world_size)]
    processes = [
        Process([_call, function, *arguments], cwd, environment(**variables), output, output)
        for variables, output in zip(world(world_size), outputs, strict=True)
    ]
    ended = [finish(process, 120) for process in processes]
    for output in outputs:
        print(output.read_text())
        output.unlink()
    return [process.rc for process in ended]


def _call(function: Callable[..., Any], *arguments: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    function(Group(), *arguments)
    dist.destroy_process_group()
