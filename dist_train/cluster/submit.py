"""`dist-train submit`: the sbatch command of a training, checked before anything waits in a queue."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from dist_train.config import Config, UserError, counted
from dist_train.parts import default_parts, part_size, parts_per_rank


def command(
    config: Config, arguments: Sequence[str], options: Mapping[str, str | int | None], further: Sequence[str]
) -> list[str]:
    """The words of the sbatch command.

    Args:
        arguments: those of `dist-train train`; `config` is what they load.
        options: of sbatch, by name without hyphens; None is left out. `nodes` and `ntasks-per-node` count the
            processes, one for each GPU if there are any.
        further: options of sbatch as they stand.

    Raises UserError for a configuration that so many processes can't train.
    """
    gpus = options.get("gpus-per-node")
    tasks = options.get("ntasks-per-node") or gpus or 1
    if gpus and tasks != gpus:
        raise UserError(
            f"--tasks-per-node: {counted(int(tasks), 'process')} for {counted(int(gpus), 'GPU')};"
            " a process needs one of its own."
        )
    train, world_size = config.train, int(options["nodes"] or 1) * int(tasks)
    parts = default_parts(train.parts, world_size, train.accumulate)
    part_size(train.batch_size, parts, world_size, train.accumulate)
    parts_per_rank(parts, world_size)
    given = {"job-name": config.run.name, **options, "ntasks-per-node": tasks}
    words = [f"--{name}={value}" for name, value in given.items() if value is not None]
    return ["sbatch", *words, *further, str(script()), *arguments]


def script(name: str = "train.sbatch") -> Path:
    """A batch script: your own in ./slurm, or the repository's, or the one in the installed package."""
    package = Path(__file__).parents[1]
    for folder in (Path("slurm"), package.parent / "slurm", package / "slurm"):
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"slurm/{name} is missing from the installation of dist_train; install it again.")


def path() -> str:
    """PATH, with this Python's folder in front where a job would find another `python`."""
    ours, search = Path(sys.executable).parent, os.environ.get("PATH", os.defpath)
    return search if shutil.which("python") == str(ours / "python") else f"{ours}{os.pathsep}{search}"


def submit(words: Sequence[str]) -> str:
    """Runs the command and returns what sbatch says. Raises UserError if it refuses, or isn't there."""
    try:
        done = subprocess.run(
            words, env={**os.environ, "PATH": path()}, capture_output=True, encoding="utf-8", errors="replace"
        )
    except FileNotFoundError:
        raise UserError(
            "there is no `sbatch` on this machine; submit from a login node of the cluster;"
            " --dry-run prints the command."
        ) from None
    if done.returncode:
        reason = " ".join(done.stderr.split()).removeprefix("sbatch: ").rstrip(".")
        raise UserError(f"sbatch refused the job: {reason or f'exit code {done.returncode}'}.")
    return (done.stderr + done.stdout).strip()
