"""dist-train in processes of their own that need not import torch first, which takes seconds of a CPU.

They are forked from a server that has imported the libraries, and nothing of dist_train.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from unittest import mock

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "accelerate", "rich.progress", "safetensors.torch", "torch._dynamo", "torch.distributed",
        "torchvision.transforms.v2", "typer",
    ]
)  # fmt: skip


class Process:
    """`python -m dist_train ARGUMENTS` as a `subprocess.Popen` has it, in a session of its own.

    Args:
        output, errors: the files to which stdout and stderr are appended.
    """

    def __init__(
        self, arguments: Sequence[str], cwd: Path, env: Mapping[str, str], output: Path, errors: Path
    ) -> None:
        given = (list(arguments), str(cwd), dict(env), str(output), str(errors))
        self._process = CONTEXT.Process(target=_main, args=given)
        with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):  # for the server, if it starts now
            self._process.start()
        self.pid = self._process.pid or 0
        self.args = ["dist-train", *arguments]

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the end; returns the exit code. Raises subprocess.TimeoutExpired."""
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        """Sends a signal."""
        os.kill(self.pid, number)


def _main(arguments: list[str], cwd: str, env: dict[str, str], output: str, errors: str) -> None:
    """What the forked process does: all that Python does at its start and at its end."""
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:0] = [cwd, *env.get("PYTHONPATH", "").split(os.pathsep)]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, path, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, output, os.O_WRONLY | os.O_CREAT | os.O_APPEND),
        (2, errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND),
    ):
        os.dup2(os.open(path, flags, 0o666), number)
    sys.argv = ["dist-train", *arguments]
    from dist_train.cli import main

    try:
        main()
    finally:
        atexit._run_exitfuncs()  # a forked process does not run them
