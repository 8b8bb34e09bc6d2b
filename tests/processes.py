"""The program as real processes: their environment, their end, and what they said."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests import warm

REPO = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Finished:
    """How a process ended."""

    rc: int
    out: str
    err: str

    def __str__(self) -> str:
        return f"exit code {self.rc}\n--- stdout\n{self.out}\n--- stderr\n{self.err}"


def environment(**extra: Any) -> dict[str, str]:
    """This environment without what a launcher or W&B put there; one CPU thread; and `extra`."""
    strange = ("WANDB_", "SLURM_", "ACCELERATE_", "TORCHELASTIC_", "MASTER_", "OMP_")
    named = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NETRC"}
    kept = {k: v for k, v in os.environ.items() if not k.startswith(strange) and k not in named}
    kept |= {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")])),
        "NETRC": os.devnull,  # no API key of the person who runs the tests
        "COLUMNS": "100",
    }
    return kept | {name: str(value) for name, value in extra.items()}


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def world(processes: int) -> list[dict[str, Any]]:
    """What torchrun would tell each rank of a job on this machine."""
    shared = {
        "WORLD_SIZE": processes,
        "LOCAL_WORLD_SIZE": processes,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }
    return [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in range(processes)]


def finish(process: subprocess.Popen[str] | warm.Process, timeout: float) -> Finished:
    """Waits for the end of a process; one that does not come to it is killed, and fails the test."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill(process)
        out, err = process.communicate()
        pytest.fail(f"still running after {timeout} s: {process.args}\n{out}\n{err}")
    return Finished(process.returncode, out, err)


def kill(process: subprocess.Popen[Any] | warm.Process) -> None:
    """Kills a process that `start` began, with all that it started, in whatever session they are."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def lives(process: psutil.Process) -> bool:
    """Whether a process has not ended; one that nobody has waited for yet has."""
    try:
        return process.is_running() and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def one_after_the_other(jobs: Sequence[tuple[Path, Sequence[Any]]], timeout: float = 300) -> list[Finished]:
    """(folder, arguments of dist-train) of many commands, run by one process."""
    with tempfile.TemporaryDirectory() as name:
        said, told = Path(name, "said"), Path(name, "told")
        words = [(str(folder), list(map(str, arguments))) for folder, arguments in jobs]
        process = warm.Process([_run_all, words], Path(name), environment(), said, told)
        done = finish(process, timeout)
    assert (done.rc, done.err) == (0, ""), done
    return [Finished(*json.loads(line)) for line in done.out.splitlines()]


def _run_all(jobs: Sequence[tuple[str, list[str]]]) -> None:
    from dist_train import cli

    for folder, arguments in jobs:
        os.chdir(folder)
        sys.argv, code, out, err = ["dist-train", *arguments], 0, io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                cli.main()
            except SystemExit as end:
                code = int(end.code or 0)
            except BaseException:
                traceback.print_exc()
                code = 1
        print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
