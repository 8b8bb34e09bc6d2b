"""`dist-train doctor`: what this machine can do, measured and not believed, and what to do about it."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from subprocess import PIPE, Popen

from dist_train.cluster import slurm

MIB, GIB = 2**20, 2**30
DISK_BYTES, REDUCE_BYTES = 64 * MIB, 16 * MIB
REDUCE_SECONDS = 120  # that two processes get to start, meet and measure


@dataclass(frozen=True)
class Finding:
    """One line of the report. It is a `failure` where training is impossible; `advice` only if not `ok`."""

    what: str
    found: str
    advice: str = ""  # what to do; empty: all is well
    failure: bool = False

    def __str__(self) -> str:
        mark = "failure" if self.failure else "warning" if self.advice else "ok"
        return f"{mark:8} {self.what:11} {self.found}" + (f" -> {self.advice}" if self.advice else "")


def examine(runs: Path) -> Iterator[Finding]:
    """Every finding, one after the other. `runs`, the folder of the runs, need not be there yet."""
    checks: list[Callable[[], Iterator[Finding]]]
    checks = [_versions, _cpus, _memory, _devices, _all_reduce, partial(_disk, runs), _limits, _slurm, _wandb]
    for check in checks:
        try:
            yield from check()
        except Exception as error:
            yield Finding("doctor", f"{type(error).__name__}: {error}", "something could not be checked")


def _versions() -> Iterator[Finding]:
    shown = ", ".join(f"{name} {version(name)}" for name in ("accelerate", "torchvision", "wandb"))
    yield Finding("Python", f"{platform.python_version()} on {platform.platform(terse=True)}; {shown}")
    try:
        import torch
        import torch.distributed as dist
    except (ImportError, OSError) as error:
        yield Finding("torch", f"can't be imported: {error}", "install dist_train again", failure=True)
        return
    found = f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"
    if torch.cuda.is_available() and dist.is_nccl_available():
        found += f", NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"
    yield Finding("torch", f"{found}, {'gloo' if dist.is_gloo_available() else 'without gloo'}")


def _cpus() -> Iterator[Finding]:
    from dist_train.runtime import allowed_cpus

    allowed, present = allowed_cpus(), os.cpu_count() or 1
    advice = "data is loaded beside the training; under SLURM: --cpus-per-task" if allowed < 2 else ""
    yield Finding("CPUs", f"{allowed} allowed of {present}, load {os.getloadavg()[0]:.1f}", advice)


def _memory() -> Iterator[Finding]:
    import psutil

    total, free = psutil.virtual_memory().total, psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # no cgroup v2, or "max": no limit
        limit, used = (
            int(Path(f"/sys/fs/cgroup/memory.{name}").read_text(encoding="utf-8"))
            for name in ("max", "current")
        )
        total, free = min(total, limit), min(free, max(0, limit - used))
    advice = "end other programs; under SLURM: --mem" if free < 2 * GIB else ""
    yield Finding("memory", f"{free / GIB:.1f} GiB free of {total / GIB:.1f}", advice)


def _devices() -> Iterator[Finding]:
    import torch

    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found = f"{torch.cuda.get_device_name(index)}, {free / GIB:.1f} GiB free of {total / GIB:.1f}"
        found += ", bf16" if torch.cuda.get_device_capability(index) >= (8, 0) else ""
        yield Finding(f"GPU {index}", found, "another program holds its memory" if free < total / 2 else "")
    if torch.backends.mps.is_available():
        yield Finding("device", "MPS, for one process; several: device=cpu")
    elif not torch.cuda.is_available():
        advice = "this torch can't use NVIDIA's driver: install another; under SLURM: --gpus-per-node"
        yield Finding("device", "CPU only", advice if shutil.which("nvidia-smi") else "")


def _all_reduce() -> Iterator[Finding]:
    """Two real processes that add up a tensor: by NCCL on two GPUs, else by gloo."""
    import torch

    backend = "nccl" if torch.cuda.device_count() > 1 else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "dist_train.tools.doctor", str(Path(folder, "meet"))]
        ranks = [
            Popen([*words, str(r), backend], stdout=PIPE, stderr=PIPE, encoding="utf-8", errors="replace")
            for r in range(2)
        ]
        end = time.monotonic() + REDUCE_SECONDS
        while None in (codes := [r.poll() for r in ranks]) and not any(codes) and time.monotonic() < end:
            time.sleep(0.05)
        for rank in ranks:
            rank.kill()
        outputs = [rank.communicate() for rank in ranks]
    what = f"{backend}, 2 processes"
    if codes == [0, 0]:
        yield Finding("all-reduce", f"{what}: {float(outputs[0][0]):.2f} GB/s on {REDUCE_BYTES // MIB} MiB")
        return
    lines = "".join(err for code, (_, err) in zip(codes, outputs, strict=True) if code).strip().splitlines()
    advice = "the wrong network card? GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME choose it"
    yield Finding("all-reduce", f"{what}: {lines[-1] if lines else 'no answer'}", advice, failure=True)


def _reduce(file: str, rank: int, backend: str) -> None:
    """One of the two, started as `python -m dist_train.tools.doctor FILE RANK BACKEND`: prints GB/s."""
    import torch
    from torch import distributed as dist

    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    dist.init_process_group(backend, init_method=f"file://{file}", rank=rank, world_size=2)
    values, seconds = torch.ones(REDUCE_BYTES // 4, device=device), []
    for _ in range(6):  # the first one connects
        begin = time.perf_counter()
        dist.all_reduce(values)
        total = values[-1].item()  # waits for the device
        seconds.append(time.perf_counter() - begin)
    if total != 2**6:
        sys.exit(f"a sum of 64 came out as {total}")
    print(REDUCE_BYTES / min(seconds) / 1e9)
    dist.destroy_process_group()


def _disk(runs: Path) -> Iterator[Finding]:
    """Speed, free space, and whether the clock of the disk agrees with ours."""
    folder = next(path for path in (runs.absolute(), *runs.absolute().parents) if path.is_dir())
    data = os.urandom(DISK_BYTES)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
            begin = time.perf_counter()
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            speed = DISK_BYTES / (time.perf_counter() - begin) / 1e6
            os.utime(file.name)  # by the clock of the disk's machine
            skew = abs(time.time() - os.stat(file.name).st_mtime)
    except OSError as error:
        yield Finding("disk", f"{folder}: {error.strerror}", "choose another run.dir", failure=True)
        return
    advice = "checkpoints will take long; choose another run.dir" if speed < 50 else ""
    yield Finding("disk", f"{folder}: {speed:,.0f} MB/s written and flushed", advice)
    free = shutil.disk_usage(folder).free / GIB
    yield Finding("free disk", f"{free:,.1f} GiB", "delete old runs" if free < 5 else "")
    found = f"{time.strftime('%Y-%m-%d %H:%M:%S %z')}, {skew:.1f} s from the disk's"
    yield Finding("clock", found, "set both by NTP; lost runs are known by times" if skew > 5 else "")


def _limits() -> Iterator[Finding]:
    """What loader processes need: shared memory to hand over batches, and open files."""
    import resource

    if Path("/dev/shm").is_dir():
        free = shutil.disk_usage("/dev/shm").free / GIB
        advice = "set data.workers=0, or start the container with --shm-size=8g" if free < 1 else ""
        yield Finding("/dev/shm", f"{free:.1f} GiB free", advice)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = soft != resource.RLIM_INFINITY and soft < 1024
    yield Finding("open files", f"{soft:,} (hard limit {hard:,})", "ulimit -n 4096" if few else "")


def _slurm() -> Iterator[Finding]:
    yield Finding("SLURM", slurm.describe(os.environ))


def _wandb() -> Iterator[Finding]:
    import wandb

    from dist_train.record.wandb import has_key

    if mode := os.environ.get("WANDB_MODE"):
        yield Finding("W&B", f"WANDB_MODE={mode}")
    elif has_key(wandb):
        yield Finding("W&B", "an API key is here: runs are mirrored online")
    else:
        yield Finding(
            "W&B",
            "no API key: runs are logged offline",
            "`wandb login`, or later `dist-train sync runs`",
        )


if __name__ == "__main__":
    _reduce(sys.argv[1], int(sys.argv[2]), sys.argv[3])
