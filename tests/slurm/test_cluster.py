"""The throwaway Slurm itself: ranks on two nodes, a requeue, and nothing left behind."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.processes import lives
from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.slurm


def test_ranks_on_two_nodes(slurm: Cluster, tmp_path: Path) -> None:
    shown = "$SLURM_PROCID $SLURM_NODEID $SLURM_LOCALID $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES"
    script = f"#!/bin/bash\nsrun bash -c 'echo {shown}'\n"
    options = ["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--output=out"]
    job = slurm.sbatch(*options, input=script, cwd=tmp_path)
    assert slurm.wait(job, "COMPLETED")["ExitCode"] == "0:0"
    lines = sorted((tmp_path / "out").read_text().splitlines())
    assert lines == ["0 0 0 n1 0,1", "1 0 1 n1 0,1", "2 1 0 n2 0,1", "3 1 1 n2 0,1"]


def test_a_requeued_job_keeps_its_id_and_output(slurm: Cluster, tmp_path: Path) -> None:
    script = """#!/bin/bash
echo job $SLURM_JOB_ID attempt ${SLURM_RESTART_COUNT:-0}
[ "${SLURM_RESTART_COUNT:-0}" = 1 ] && exit 3
scontrol requeue $SLURM_JOB_ID
sleep 60
"""
    options = ["--nodes=1", "--requeue", "--open-mode=append", "--output=out"]
    job = slurm.sbatch(*options, input=script, cwd=tmp_path)
    info = slurm.wait(job, "FAILED")
    assert (info["Restarts"], info["ExitCode"]) == ("1", "3:0")
    said = (tmp_path / "out").read_text().splitlines()
    attempts = [line for line in said if line.startswith("job")]
    assert attempts == [f"job {job} attempt 0", f"job {job} attempt 1"]


def test_no_process_is_left(tmp_path: Path) -> None:
    """Not even of a job that ignores signals, on a node whose slurmd was killed."""
    with Cluster(tmp_path, nodes=1) as cluster:
        script = "#!/bin/bash\ntrap '' TERM CONT\ntouch started\nwhile :; do sleep 1; done\n"
        cluster.sbatch(input=script)
        deadline = time.monotonic() + 30
        while not (tmp_path / "started").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        cluster.kill_node("n1")
        processes = cluster.processes()
        names = {process.name() for process in processes}
        assert {"munged", "slurmctld", "slurmstepd", "slurm_script", "sleep"} <= names
    assert cluster.processes() == []
    assert not any(map(lives, processes))


def test_a_failed_start_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(tmp_path, nodes=1)
    names: set[str] = set()

    def fail() -> None:
        names.update(process.name() for process in cluster.processes())
        raise RuntimeError("the nodes did not come up")

    monkeypatch.setattr(cluster, "wait_until_idle", fail)
    with pytest.raises(RuntimeError, match="did not come up"), cluster:
        pass
    assert {"munged", "slurmctld", "slurmd"} <= names
    assert cluster.processes() == []
