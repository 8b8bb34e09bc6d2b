"""Processes, devices and threads: what this process is among the others, and what it runs on.

`start` checks that as many processes came up as were asked for, and returns a `Runtime`.
"""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin

from dist_train import __version__, heap
from dist_train.cluster import board, slurm
from dist_train.cluster.accelerate import asked_of_accelerate, was_launched
from dist_train.config import Config, UserError, counted
from dist_train.tree import sum_over_ranks, tree_sum

MANY_RANKS = 64  # up to so many, each gets the tensors of all others to add up: one collective less


@dataclass(frozen=True)
class Runtime:
    """This process among the others of the run."""

    accelerator: Accelerator
    device: torch.device
    rank: int
    local_rank: int
    world_size: int
    local_world_size: int

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the only one that writes."""
        return self.rank == 0

    @property
    def device_name(self) -> str:
        """What the maker calls the GPU, as `NVIDIA H200`; else the kind of device, as `cpu`."""
        is_cuda = self.device.type == "cuda"
        return torch.cuda.get_device_name(self.device) if is_cuda else self.device.type

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of a small `tensor` over all ranks, in the order of ranks."""
        if self.world_size > MANY_RANKS:  # in the same order, with the traffic of two tensors a rank
            return sum_over_ranks(tensor.flatten().clone(), self.world_size).view_as(tensor)
        return self.sum_soon(tensor)()

    def sum_soon(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Begins `sum`; what it returns waits for the end. Until then `tensor` is to be left alone."""
        if self.world_size == 1:
            return lambda: tensor
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        work = dist.all_gather(parts, tensor, async_op=True)

        def finish() -> torch.Tensor:
            work.wait()
            return tree_sum(parts)

        return finish

    def memory(self) -> dict[str, float]:
        """The greatest memory so far, in GB: of the GPU that this process uses, else of the process."""
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            peak *= 1 if sys.platform == "darwin" else 1024
        return {"perf/memory_gb": round(peak / 1e9, 3)}

    def machine(self) -> dict[str, Any]:
        """What this process runs on, for the record."""
        return {
            "device": self.device_name,
            "threads": torch.get_num_threads(),
            "system": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "dist_train": __version__,
        }

    def from_main(self, value: Any) -> Any:
        """Rank 0's `value` (any small picklable object) on every rank."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value` (any small picklable object), in the order of ranks, on every rank."""
        values: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """Turns a UserError on any rank into the same UserError on all, so that none waits in vain."""
        error = None
        try:
            yield
        except UserError as caught:
            error = caught
        count = torch.tensor([float(error is not None)], device=self.device)
        if not self.sum(count).item():  # of texts, which take more, only if there are any
            return
        errors = self.gather(str(error) if error else "")
        failed = [rank for rank, text in enumerate(errors) if text]
        if failed:
            where = "" if len(failed) == self.world_size else f"rank {failed[0]}: "
            raise UserError(f"{where}{errors[failed[0]]}") from error

    @contextmanager
    def main_of_node_first(self) -> Iterator[None]:
        """Lets each node's first rank through before the others: it downloads, they find the files."""
        if self.local_rank != 0 and self.world_size > 1:
            dist.barrier()
        try:
            yield
        finally:
            if self.local_rank == 0 and self.world_size > 1:
                dist.barrier()


def start(config: Config) -> Runtime:
    """Joins the process group and chooses device, threads and precision.

    Raises UserError when a device is missing or fewer processes came up than were asked for.
    """
    os.environ.update(slurm.ranks(os.environ))
    slurm.check_ranks(os.environ)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    _check_meeting(world_size)
    device = choose_device(config.device, torch.cuda.is_available(), torch.backends.mps.is_available())
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device == "cuda" and torch.cuda.device_count() < local_world_size:
        raise UserError(
            f"{counted(local_world_size, 'process')} on this node but"
            f" {counted(torch.cuda.device_count(), 'GPU')}: start one process per GPU, or set device=cpu."
        )
    if device == "mps" and world_size > 1:
        raise UserError("device: MPS works with one process only; start one, or set device=cpu.")
    if device == "cpu":
        heap.keep()
    torch.set_num_threads(cpu_threads(config.threads, local_world_size, os.environ))
    if config.precision == "tf32":
        torch.set_float32_matmul_precision("high")
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    timeout = timedelta(seconds=config.timeout_seconds)
    if world_size > 1 and (board.current or "TORCHELASTIC_RUN_ID" in os.environ):
        _meet("nccl" if device == "cuda" else "gloo", timeout)
    accelerator = Accelerator(
        cpu=device == "cpu",
        mixed_precision=config.precision if config.precision in ("bf16", "fp16") else "no",
        # The loop accumulates by itself; a number in Accelerate's own config must not divide the loss.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timeout),
            # Gradients are views of DDP's buckets: one copy less per step.
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ],
    )
    return Runtime(
        accelerator=accelerator,
        # Accelerate may say "cpu:0", which torch takes for another device than "cpu" and copies to.
        device=torch.device("cpu") if device == "cpu" else accelerator.device,
        rank=accelerator.process_index,
        local_rank=local_rank,
        world_size=accelerator.num_processes,
        local_world_size=local_world_size,
    )


def _check_meeting(world_size: int) -> None:
    """Raises UserError where fewer processes came up than were asked for, or could not find each other."""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise UserError(
            "Accelerate was asked for FSDP, which is not what shards a model here; use launch/fsdp.yaml, and"
            " parallel.name=fsdp."
        )
    if (asked := asked_of_accelerate()) and asked > world_size:
        raise UserError(
            f"accelerate was asked for {counted(asked, 'process')} but started {world_size}, as it does with"
            " its CPU settings; use launch/cpu_2.yaml, whose distributed_type is MULTI_GPU, or torchrun."
        )
    if world_size > 1 and not os.environ.get("MASTER_ADDR"):
        raise UserError(
            f"WORLD_SIZE is {world_size}, but MASTER_ADDR, where ranks meet, is not set; start them by"
            " torchrun, accelerate launch or srun."
        )
    if world_size > 1 and os.environ.get("MASTER_PORT") == "0":
        raise UserError(
            "MASTER_PORT is 0, where ranks can't meet; use torchrun --standalone for a free port."
        )


def _meet(backend: str, timeout: timedelta) -> None:
    """Joins the process group among the ranks of this very attempt.

    A launcher keeps one store over all its restarts, and torch reads the addresses of the others there, also
    those of dead ones, for which it would wait until the timeout.
    """
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    own = dist.PrefixStore(_agree(store, rank, world_size, timeout.total_seconds()), store)
    dist.init_process_group(backend, store=own, rank=rank, world_size=world_size, timeout=timeout)


def _agree(store: Any, rank: int, world_size: int, seconds: float) -> str:
    """A name of this attempt, chosen by rank 0, whatever attempts before it have left in the store.

    Each rank greets rank 0 by a name that nobody had before, and waits for the answer to this name.
    """
    mine = os.urandom(8).hex()
    if rank > 0:
        store.set(f"greeting/{rank}", mine)
        attempt = store.get(f"answer/{mine}").decode()
        store.set(f"thanks/{attempt}/{rank}", "")
        return attempt
    greetings = [f"greeting/{other}" for other in range(1, world_size)]
    thanks = {other: f"thanks/{mine}/{other}" for other in range(1, world_size)}
    answered: set[bytes] = set()
    deadline = time.monotonic() + seconds
    while not store.check(list(thanks.values())):  # each is one request, however many ranks there are
        if store.check(greetings):
            new = set(store.multi_get(greetings)) - answered  # with those of dead ranks
            store.multi_set([f"answer/{name.decode()}" for name in new], [mine] * len(new))
            answered |= new
        if time.monotonic() > deadline:
            missing = [other for other, key in thanks.items() if not store.check([key])]
            raise RuntimeError(f"ranks {missing} have not come in {seconds:.0f} s")
        time.sleep(0.01 * (1 + world_size / 1000))
    return mine


def stop(accelerator: Accelerator) -> None:
    """Leaves the process group, if there is one, and forgets the device: another run may follow."""
    if dist.is_available() and dist.is_initialized():
        accelerator.free_memory()  # DDP keeps the group's threads, and at Python's end they would abort it
        dist.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)


def let_go(error: BaseException | None) -> None:
    """Frees what the frames of an error hold that is told without its traceback, DDP among it."""
    while error:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


# --- decisions, each a pure function of what it is given -----------------------------------------


def choose_device(wanted: str, cuda: bool, mps: bool) -> str:
    """`wanted`, or for `auto` the first of CUDA, MPS, CPU that is there.

    Raises UserError if what is wanted is not there.
    """
    if wanted == "auto":
        return "cuda" if cuda else "mps" if mps else "cpu"
    if (wanted == "cuda" and not cuda) or (wanted == "mps" and not mps):
        raise UserError(f"device: '{wanted}' is not available on this machine; use device=auto.")
    return wanted


def allowed_cpus() -> int:
    """The number of CPUs that this process may really use: affinity and cgroup limits respected."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        return max(1, min(count or 1, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup v2, or "max": no limit
        return max(1, count or 1)


def cpu_threads(wanted: int | None, local_world_size: int, env: dict[str, str] | os._Environ[str]) -> int:
    """CPU threads for this rank: as wanted, else OMP_NUM_THREADS, else a fair share of the CPUs."""
    if wanted:
        return wanted
    # torchrun and Accelerate set 1 where the user set nothing; that is no wish of the user's.
    launcher_default = was_launched(env) and env.get("OMP_NUM_THREADS") == "1"
    if env.get("OMP_NUM_THREADS", "").isdigit() and not launcher_default:
        return max(1, int(env["OMP_NUM_THREADS"]))
    return max(1, allowed_cpus() // local_world_size)
