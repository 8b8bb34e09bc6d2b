"""Functions of a test on several ranks: forked processes that join a gloo group."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.processes import free_port
from tests.warm import CONTEXT


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


def on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any, cwd: Path) -> list[int | None]:
    """Calls function(group, *arguments) in the folder `cwd` on so many ranks; returns their exit codes.

    The function is one of a module, since the processes import it.
    """
    port = free_port()
    given = (port, world_size, str(cwd), function, arguments)
    processes = [CONTEXT.Process(target=_call, args=(rank, *given)) for rank in range(world_size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def _call(
    rank: int, port: int, world_size: int, cwd: str, function: Callable[..., Any], arguments: Any
) -> None:
    os.chdir(cwd)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    function(Group(), *arguments)
    dist.destroy_process_group()
