"""Batch jobs in a folder of their own, and looking at what they left."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_train.record.history import read_metrics
from tests.processes import REPO, environment
from tests.slurm.cluster import Cluster


class Jobs:
    """Jobs that are submitted from `folder`, where slurm/ is as in the repository, with a site.sh.

    Args:
        python: how a rank starts Python; by default the one that runs the tests.
        site: further lines of site.sh.
    """

    def __init__(self, slurm: Cluster, folder: Path, python: str = "", site: str = "") -> None:
        self.slurm, self.folder = slurm, folder
        (folder / "slurm").mkdir()
        for script in ("train.sbatch", "sweep.sbatch"):
            (folder / "slurm" / script).symlink_to(REPO / "slurm" / script)
        lines = [
            f"export PYTHONPATH={shlex.quote(environment()['PYTHONPATH'])}",
            f"python=({python or shlex.quote(sys.executable)})",
            site,
        ]
        (folder / "slurm/site.sh").write_text("\n".join(lines) + "\n")

    def submit(self, *options: str, script: str = "train.sbatch", arguments: list[Any] | None = None) -> str:
        """`sbatch OPTIONS slurm/SCRIPT ARGUMENTS`; returns the job's id."""
        words = map(str, arguments or [])
        return self.slurm.sbatch("--output=%x.out", *options, f"slurm/{script}", *words, cwd=self.folder)

    def said(self, name: str) -> str:
        """What the job of this name has written so far."""
        output = self.folder / f"{name}.out"
        return output.read_text() if output.exists() else ""

    def wait(self, job: str, condition: Callable[[], Any], seconds: float = 120) -> None:
        """Waits until condition(); fails if the job ends before or nothing comes."""
        deadline = time.monotonic() + seconds
        while not condition():
            info = self.slurm.job_info(job)
            living = info["JobState"] in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING")
            if not living or time.monotonic() > deadline:
                output = Path(info["StdOut"])
                raise AssertionError(f"{info}\n{output.read_text() if output.is_file() else ''}")
            time.sleep(0.1)

    def wait_for_step(self, job: str, run: str, step: int) -> None:
        """Waits until the run has recorded this step."""
        self.wait(job, lambda: self.step(run) >= step)

    def step(self, run: str) -> int:
        """The last step that the run has recorded."""
        folder = self.folder / "runs" / run
        rows = read_metrics(folder) if (folder / "metrics.jsonl").exists() else []
        return int(rows[-1]["step"]) if rows else 0
