"""`dist-train submit`: nothing waits in a queue that can't run, and what is submitted is what is shown."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dist_train.cluster.submit import command, script, submit
from dist_train.config import UserError, load
from tests.processes import REPO, Finished

BIN = str(Path(sys.executable).parent)
SBATCH = """#!/bin/sh
printf '%s\\n' "$@" >sbatch.arguments
command -v python >sbatch.python
echo "Submitted batch job 17"
"""
OPTIONS = {"nodes": 2, "ntasks-per-node": None, "gpus-per-node": 8, "time": None}


@pytest.fixture
def sbatch(tmp_path: Path) -> dict[str, str]:
    """The environment of a machine with an sbatch that notes what it is given."""
    program = tmp_path / "bin/sbatch"
    program.parent.mkdir()
    program.write_text(SBATCH)
    program.chmod(0o755)
    return {"PATH": f"{program.parent}:/usr/bin:/bin"}


def test_what_is_shown_is_what_is_submitted(
    cli: Callable[..., Finished], sbatch: dict[str, str], tmp_path: Path
) -> None:
    words = [
        REPO / "configs/quickstart.yaml", "run.name=big one", "--nodes", 2, "--gpus-per-node", 4,
        "--time", "12:00:00", "--qos=long", "--partition", "gpu", "optim.lr=0.2",
    ]  # fmt: skip
    result = cli("submit", *words, env=sbatch)
    assert (result.rc, result.err) == (0, ""), result
    shown, told = result.out.splitlines()
    assert told == "Submitted batch job 17"
    assert shlex.split(shown) == [
        "sbatch", "--job-name=big one", "--nodes=2", "--ntasks-per-node=4", "--gpus-per-node=4",
        "--time=12:00:00", "--partition=gpu", "--qos=long", str(REPO / "slurm/train.sbatch"),
        str(REPO / "configs/quickstart.yaml"), "run.name=big one", "optim.lr=0.2",
    ]  # fmt: skip
    assert (tmp_path / "sbatch.arguments").read_text().splitlines() == shlex.split(shown)[1:]
    assert (tmp_path / "sbatch.python").read_text().strip() == f"{BIN}/python"  # and not the system's

    (tmp_path / "sbatch.arguments").unlink()
    dry = cli("submit", *words, "--dry-run", env={"PATH": "/nowhere"})
    assert (dry.rc, dry.out) == (0, f"{shown}\n"), dry
    assert not (tmp_path / "sbatch.arguments").exists()


def test_a_mistake_in_the_configuration_is_told_before_anything_is_submitted(
    cli: Callable[..., Finished], sbatch: dict[str, str], tmp_path: Path
) -> None:
    result = cli("submit", REPO / "configs/quickstart.yaml", "optim.lrr=0.2", env=sbatch)
    assert (result.rc, result.out, result.err.count("\n")) == (2, "", 1), result
    assert "'optim.lrr' (did you mean 'optim.lr'?)" in result.err
    assert not (tmp_path / "sbatch.arguments").exists()


def test_the_number_of_processes_must_fit() -> None:
    config = load([], ["train.epochs=1", "train.batch_size=24"])
    with pytest.raises(UserError, match="24 can't be divided by 16 processes"):
        command(config, [], OPTIONS, [])
    with pytest.raises(UserError, match="--tasks-per-node: 2 processes for 8 GPUs"):
        command(config, [], {**OPTIONS, "ntasks-per-node": 2}, [])
    one = command(config, [], {"nodes": 1, "ntasks-per-node": None, "gpus-per-node": None}, [])
    assert one[1:-1] == ["--job-name=run", "--nodes=1", "--ntasks-per-node=1"]


def test_without_sbatch_or_when_it_refuses_one_sentence_tells(
    sbatch: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="there is no `sbatch` on this machine; submit from a login node"):
        submit(["sbatch", "x"])
    program = tmp_path / "bin/sbatch"
    program.write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: gpu' >&2\nexit 1\n")
    monkeypatch.setenv("PATH", sbatch["PATH"])
    with pytest.raises(UserError) as error:
        submit(["sbatch", "x"])
    assert str(error.value) == "sbatch refused the job: error: invalid partition specified: gpu."


def test_the_batch_script_is_found_in_the_repository_in_a_wheel_and_here(
    run: Callable[..., Finished], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert script() == REPO / "slurm/train.sbatch"
    assert os.access(script("sweep.sbatch"), os.R_OK)

    wheel = tmp_path / "site-packages/dist_train"  # as pyproject.toml's force-include lays it out
    shutil.copytree(REPO / "dist_train", wheel, ignore=shutil.ignore_patterns("__pycache__", "assets"))
    shutil.copytree(REPO / "slurm", wheel / "slurm")
    program = "from dist_train.cluster.submit import script; print(script().resolve())"
    environment: dict[str, Any] = {"PYTHONPATH": wheel.parent}
    assert run("-c", program, env=environment).out.strip() == str(wheel / "slurm/train.sbatch")

    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm/train.sbatch").write_text("#!/bin/sh\n")  # your own goes first
    assert script() == Path("slurm/train.sbatch")
