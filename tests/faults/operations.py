"""SIGKILL between any two operations on files, over a whole short run: its saves, its end, its going on.

A forked process counts its operations on files below `runs`, and kills itself ahead of the one it is told.
"""

from __future__ import annotations

import os
import signal
import stat
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from dist_train.checkpoint import load, newest_first
from dist_train.record.history import read_metrics, read_status
from tests import warm
from tests.distributed.ranks import same_bits
from tests.processes import environment
from tests.worlds import SMALL, write_npz

# The best is neither the first nor the last one, and older ones are pruned.
WORDS = [
    "train", *SMALL, "train.steps=6", "model.args.hidden=[4]", "eval.every=2", "checkpoint.every=2",
    "checkpoint.keep=1", "log.every=3", "checkpoint.best=max eval/loss",
]  # fmt: skip
OPERATIONS = {"os.rename", "os.remove", "os.symlink", "os.mkdir", "os.truncate", "os.link"}


def watch(kill_at: int = 0, tell: Callable[[str], None] = lambda name: None) -> None:
    """Counts this process's operations on files below `runs`, and kills it ahead of number `kill_at`.

    A write that is killed is half done.
    """
    me, done = os.getpid(), 0

    def count(name: str, half: Callable[[], Any] = lambda: None) -> None:
        nonlocal done
        if os.getpid() != me:  # a worker process
            return
        done += 1
        tell(name)
        if done == kill_at:
            half()
            os.kill(me, signal.SIGKILL)

    def hear(event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and bool(args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if writes or event in OPERATIONS:
            path = args[1] if event == "os.symlink" else args[0]
            if "runs" in Path(str(path)).parts:
                count(f"{event} {path}")

    def is_file(descriptor: int) -> bool:
        mode = os.fstat(descriptor).st_mode
        return stat.S_ISREG(mode) or stat.S_ISDIR(mode)

    def fsync(descriptor: int, real: Callable[[int], None] = os.fsync) -> None:
        count("fsync")
        real(descriptor)

    def write(descriptor: int, data: bytes, real: Callable[[int, bytes], int] = os.write) -> int:
        if is_file(descriptor):
            count("write", lambda: real(descriptor, data[: len(data) // 2]))
        return real(descriptor, data)

    os.fsync, os.write = fsync, write
    sys.addaudithook(hear)


def run(folder: Path, name: str, kill_at: int = 0) -> int | None:
    """Trains in `folder`; returns the exit code. The operations are listed in `name`.txt."""
    output = folder / "output.txt"
    given = ([*WORDS, f"run.name={name}"], str(folder), environment(), str(output), str(output))
    process = warm.CONTEXT.Process(target=_run, args=(str(folder / f"{name}.txt"), kill_at, given))
    process.start()
    process.join(120)
    code = process.exitcode
    process.kill()
    process.join()
    return code


def _run(operations: str, kill_at: int, given: tuple[Any, ...]) -> None:
    listed = os.open(operations, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    write = os.write
    watch(kill_at, lambda name: write(listed, f"{name}\n".encode()) and None)
    warm._main(*given)


def undisturbed(folder: Path) -> list[str]:
    """Trains without a kill; returns the operations on files that this took."""
    write_npz(folder)
    assert run(folder, "undisturbed") == 0, (folder / "output.txt").read_text()
    return (folder / "undisturbed.txt").read_text().splitlines()


def kill_ahead_of(folder: Path, numbers: Iterable[int], again: int = 0) -> None:
    """Kills a new run ahead of each of these operations, lets it go on, and compares its end.

    Args:
        again: the attempt that goes on is killed, too, ahead of this operation.

    Raises AssertionError for whatever differs.
    """
    for number in numbers:
        name = f"killed-{number}-{again}"
        codes = [run(folder, name, number)]
        at = (folder / f"{name}.txt").read_text().splitlines()[-1]
        if again:
            codes.append(run(folder, name, again))
        codes.append(run(folder, name))
        what = f"killed ahead of operation {number} ({at}), {codes}"
        assert codes[-1] == 0, f"{what}\n{(folder / 'output.txt').read_text()[-3000:]}"
        assert set(codes[:-1]) <= {0, -signal.SIGKILL}, what
        for difference in differences(folder / "runs" / "undisturbed", folder / "runs" / name):
            raise AssertionError(f"{what}: {difference}")


def differences(one: Path, other: Path) -> Iterable[str]:
    """What is not the same in two runs that are complete."""
    if read_status(other)["state"] != "completed":
        yield f"status.json: {read_status(other)}"
    for link in ("last.pt", "best.pt"):
        paths = [run / "checkpoints" / link for run in (one, other)]
        if os.readlink(paths[0]) != os.readlink(paths[1]):
            yield f"{link}: {os.readlink(paths[1])} instead of {os.readlink(paths[0])}"
        elif not same_bits(*map(load, paths)):
            yield f"{link}: other bits"
    names = [[path.name for path in newest_first(run / "checkpoints")] for run in (one, other)]
    if names[0] != names[1]:
        yield f"checkpoints: {names[1]} instead of {names[0]}"
    if (one / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes():
        yield "model.safetensors: other bits"
    if history(one) != history(other):
        yield f"metrics.jsonl: {history(other)} instead of {history(one)}"
    if left := sorted(path.name for path in other.rglob("*") if "tmp" in path.name or "lock" in path.name):
        yield f"left behind: {left}"


def history(run: Path) -> list[dict[str, Any]]:
    """The effective rows without what a clock tells."""
    clocks = ("time", "attempt")
    return [
        {k: v for k, v in row.items() if k not in clocks and not k.startswith("perf/")}
        for row in read_metrics(run)
    ]
