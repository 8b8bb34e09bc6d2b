"""Slurm's commands, as a person at a terminal gives them."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from tests.processes import environment

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "DEADLINE", "BOOT_FAIL", "OUT_OF_MEMORY")


class Commands:
    """Runs commands in `folder`, if not told otherwise, with `variables` in their environment."""

    def __init__(self, folder: Path, variables: dict[str, str]) -> None:
        self.folder = folder
        self.variables = variables

    def run(
        self, command: Sequence[Any], cwd: Path | None = None, timeout: float = 120, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Runs a Slurm command to its end, as a user would, in `cwd` or else in `self.folder`.

        Options: env={...} is added to the environment; input="..." is the standard input.
        """
        return subprocess.run(
            [str(word) for word in command],
            cwd=cwd or self.folder,
            env=environment(**{**options.pop("env", {}), **self.variables}),
            **{"input": "", "capture_output": True, "text": True, "timeout": timeout, **options},
        )

    def ask(self, *command: Any, **options: Any) -> str:
        """The output of a Slurm command that must succeed; `options` as for `run`."""
        done = self.run(command, **options)
        if done.returncode:
            raise RuntimeError(f"{command} gave {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout.strip()

    def srun(self, *arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
        """`srun ARGUMENTS`, to its end."""
        return self.run(["srun", *arguments], **options)

    def sbatch(self, *arguments: Any, **options: Any) -> str:
        """`sbatch ARGUMENTS`; returns the job's id. input="#!/bin/bash…" needs no file."""
        return self.ask("sbatch", "--parsable", *arguments, **options).split(";")[0]

    def scontrol(self, *arguments: Any) -> str:
        """`scontrol ARGUMENTS`; returns its output."""
        return self.ask("scontrol", *arguments)

    def job_info(self, job: str) -> dict[str, str]:
        """`scontrol show job`: {"JobState": "RUNNING", "Restarts": "0", "ExitCode": "0:0", …}.

        A task of an array is 12_1; of 12 only the first line is taken.
        """
        line = self.scontrol("show", "job", "--oneliner", job).partition("\n")[0]
        return dict(re.findall(r"(\S+?)=(.*?)(?= \S+?=|\s*$)", line))

    def state(self, job: str) -> str:
        """The job's state by its long name, such as PENDING or COMPLETED."""
        return self.job_info(job)["JobState"]

    def wait(self, job: str, states: str | Collection[str], timeout: float = 120) -> dict[str, str]:
        """Waits for one of `states` and returns the job's info; fails if it ends otherwise."""
        wanted = {states} if isinstance(states, str) else set(states)
        deadline = time.monotonic() + timeout
        while (info := self.job_info(job))["JobState"] not in wanted:
            if info["JobState"] in ENDED or time.monotonic() > deadline:
                output = Path(info.get("StdOut", os.devnull))
                said = output.read_text()[-4000:] if output.is_file() else ""
                raise TimeoutError(f"job {job} is not {sorted(wanted)}: {info}\n{said}")
            time.sleep(0.1)
        return info
