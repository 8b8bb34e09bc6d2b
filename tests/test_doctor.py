"""`dist-train doctor`: what it tells was measured here, and what makes training impossible is exit code 1."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import accelerate
import pytest
import torch

from dist_train.runtime import allowed_cpus
from tests.processes import Finished

LINE = re.compile(
    r"(ok|warning|failure) +(Python|torch|CPUs|memory|device|GPU \d+|all-reduce|disk|free disk|clock"
    r"|/dev/shm|open files|SLURM|W&B) +(.+)"
)


def lines(result: Finished) -> dict[str, tuple[str, str]]:
    """{what: (mark, what is told)} of each line; each must be one of ours."""
    found = [LINE.fullmatch(line) for line in result.out.splitlines()]
    assert all(found), result
    return {match[2]: (match[1], match[3]) for match in found if match}


@pytest.mark.long
def test_a_machine_that_can_train_is_told_to(cli: Callable[..., Finished], tmp_path: Path) -> None:
    result = cli("doctor", env={"SLURM_JOB_ID": "12", "SLURM_NTASKS": "1", "WANDB_MODE": "offline"})
    assert (result.rc, result.err) == (0, ""), result
    told = lines(result)
    assert f"accelerate {accelerate.__version__}" in told["Python"][1]
    assert torch.__version__ in told["torch"][1]
    assert told["CPUs"][1].startswith(f"{allowed_cpus()} allowed of ")
    mark, reduced = told["all-reduce"]
    speed = re.search(r"2 processes: ([\d.]+) GB/s on 16 MiB", reduced)
    assert mark == "ok"
    assert speed
    assert float(speed[1]) > 0
    assert str(tmp_path) in told["disk"][1]
    assert told["clock"][0] == "ok"
    assert told["SLURM"] == ("ok", "in a job: JOB_ID=12 NTASKS=1")
    assert told["W&B"] == ("ok", "WANDB_MODE=offline")
    assert list(tmp_path.iterdir()) == []  # nothing is left behind, no empty runs/ either


@pytest.mark.long
def test_what_makes_training_impossible_is_exit_code_1(cli: Callable[..., Finished], tmp_path: Path) -> None:
    no_card = {"GLOO_SOCKET_IFNAME": "nocard0", "NCCL_SOCKET_IFNAME": "nocard0"}
    result = cli("doctor", "--runs", "/proc/runs", env={**no_card, "HOME": tmp_path})
    assert (result.rc, result.err) == (1, ""), result
    told = lines(result)
    assert {what for what, (mark, _) in told.items() if mark == "failure"} == {"all-reduce", "disk"}
    assert "GLOO_SOCKET_IFNAME" in told["all-reduce"][1]
    assert told["disk"][1].endswith("-> choose another run.dir")
    assert told["W&B"][0] == "warning"
    assert told["W&B"][1].endswith("-> `wandb login`, or later `dist-train sync runs`")
