"""Processes of their own that need not import torch first, which takes seconds of a CPU.

They are forked from a server that has imported the libraries and dist_train.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.machinery import PathFinder
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

PR_SET_PDEATHSIG = 1
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "accelerate", "rich.progress", "safetensors.torch", "torch._dynamo", "torch.distributed",
        "torchvision.transforms.v2", "typer._adapters", "dist_train.train", "dist_train.predict",
        "dist_train.cli", "tests.ready",
    ]
)  # fmt: skip


@functools.cache
def serve() -> None:
    """Starts the server, which computes with one thread."""
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):
        forkserver.ensure_running()


class Process:
    """A command as a `subprocess.Popen` has it, in a session of its own.

    Args:
        command: arguments of dist-train; or a script (`*.py`) and its arguments; or a function of a module
            and its arguments.
        output, errors: the files to which stdout and stderr are appended; may be the same.
    """

    def __init__(
        self, command: Sequence[Any], cwd: Path, env: Mapping[str, str], output: Path, errors: Path
    ) -> None:
        self.output, self.errors = output, errors
        self.args = list(command) if command and callable(command[0]) else list(map(str, command))
        given = (self.args, str(cwd), dict(env), str(output), str(errors))
        self._process = CONTEXT.Process(target=_main, args=given)
        serve()
        self._process.start()
        self.pid = self._process.pid or 0

    @property
    def returncode(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the end; returns the exit code. Raises subprocess.TimeoutExpired."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Waits for the end; returns what it said to stdout and stderr. Raises subprocess.TimeoutExpired."""
        self.wait(timeout)
        out, err = (path.read_text() if path.exists() else "" for path in (self.output, self.errors))
        return out, err

    def send_signal(self, number: int) -> None:
        """Sends a signal."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Sends SIGKILL."""
        self.send_signal(signal.SIGKILL)


def _main(command: list[Any], cwd: str, env: dict[str, str], output: str, errors: str) -> None:
    """What the forked process does: all that Python does at its start and at its end."""
    gc.freeze()  # the collector would look through all that was imported, a quarter of a short test's time
    os.setsid()
    _end_with_the_tests()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:0] = [cwd, *env.get("PYTHONPATH", "").split(os.pathsep)]
    _forget_another_copy()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, output, os.O_WRONLY | os.O_CREAT | os.O_APPEND),
        (2, errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND),
    ):
        os.dup2(os.open(path, flags, 0o666), number)
    # Not the server's, which remember what kind of file was there.
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    first, *rest = command or [""]
    try:
        if callable(first):
            first(*rest)
        elif first.endswith(".py"):
            sys.argv = command
            runpy.run_path(first, run_name="__main__")
        else:
            sys.argv = ["dist-train", *command]
            from dist_train.cli import main
            from dist_train.cli import train as commands

            commands.BEGAN = time.monotonic()  # this process did, not the server
            main()
    finally:
        atexit._run_exitfuncs()  # a forked process does not run them


def _forget_another_copy() -> None:
    """Forgets dist_train where `sys.path` has another copy of it: who asks for it gets that one."""
    found = PathFinder.find_spec("dist_train", sys.path)
    if found and found.origin != sys.modules["dist_train"].__file__:
        for name in [name for name in sys.modules if name.partition(".")[0] == "dist_train"]:
            del sys.modules[name]


def _end_with_the_tests() -> None:
    """Where the tests are killed, the server ends, and on Linux this process with it."""
    inherited = forkserver._forkserver
    if inherited._forkserver_alive_fd is not None:  # the server lives as long as any process has it
        os.close(inherited._forkserver_alive_fd)
        inherited._forkserver_alive_fd = None
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
