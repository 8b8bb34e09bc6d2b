"""slurm/*.sbatch by themselves: what they tell ranks, and when they requeue. Ranks are shell scripts here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import Jobs

pytestmark = pytest.mark.slurm

TELLS = """
import json, os, sys
from dist_train.cluster import slurm
told = slurm.ranks(os.environ) | {k: os.environ[k] for k in ("OMP_NUM_THREADS", "SLURMD_NODENAME")}
told |= {"attempt": os.environ.get("SLURM_RESTART_COUNT", "0"), "arguments": sys.argv[1:]}
print(json.dumps(told), flush=True)
"""


def rank(folder: Path, code: str) -> str:
    """How a rank is started that does what `code`, a shell script, says."""
    (folder / "rank.sh").write_text(code)
    return f"bash {folder}/rank.sh"


def test_each_rank_has_its_own_number_and_each_attempt_its_own_port(slurm: Cluster, tmp_path: Path) -> None:
    """Also where sbatch hands on no environment, and threads come from --cpus-per-task."""
    (tmp_path / "tells.py").write_text(TELLS)
    # As ranks do: where one has ended, srun asks the others to, and they end with the same code.
    end = "exit $((${SLURM_RESTART_COUNT:-0} ? 0 : 75))"
    told = "told-${SLURM_RESTART_COUNT:-0}"  # a file of each: none ends before all are there
    meet = f"touch {told}-$SLURM_PROCID; until [ $(ls {told}-* | wc -l) = 4 ]; do sleep 0.1; done"
    tells = f'trap "{end}" TERM; {sys.executable} tells.py "$@"; {meet}; {end}'
    jobs = Jobs(slurm, tmp_path, rank(tmp_path, tells), "unset OMP_NUM_THREADS")
    job = jobs.submit(
        "--job-name=ranks", "--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=2", "--export=NONE",
        arguments=["a b.yaml", "x=$y"],
    )  # fmt: skip
    slurm.wait(job, "COMPLETED")
    lines = [json.loads(line) for line in jobs.said("ranks").splitlines() if line.startswith("{")]
    assert len(lines) == 8, jobs.said("ranks")
    attempts = [[each for each in lines if each["attempt"] == attempt] for attempt in "01"]
    for ranks in attempts:
        ranks.sort(key=lambda each: each["RANK"])
        assert [each["RANK"] for each in ranks] == ["0", "1", "2", "3"]
        assert [each["LOCAL_RANK"] for each in ranks] == ["0", "1", "0", "1"]
        assert [each["SLURMD_NODENAME"] for each in ranks] == ["n1", "n1", "n2", "n2"]
        for name, value in {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "2"}.items():
            assert {each[name] for each in ranks} == {value}
        assert len({(each["MASTER_ADDR"], each["MASTER_PORT"]) for each in ranks}) == 1
        assert all(each["arguments"] == ["-m", "dist_train", "train", "a b.yaml", "x=$y"] for each in ranks)
    assert attempts[0][0]["MASTER_PORT"] != attempts[1][0]["MASTER_PORT"]


def test_requeues_have_an_end(slurm: Cluster, tmp_path: Path) -> None:
    jobs = Jobs(slurm, tmp_path, rank(tmp_path, "echo attempt; exit 75"), "max_requeues=1")
    job = jobs.submit("--job-name=cap")
    info = slurm.wait(job, "FAILED")
    assert (info["Restarts"], info["ExitCode"]) == ("1", "75:0")
    assert jobs.said("cap").count("attempt\n") == 2
    assert "not started again after 1 requeues (max_requeues)" in jobs.said("cap")


def test_the_last_task_of_an_array_requeues_itself_alone(slurm: Cluster, tmp_path: Path) -> None:
    """$SLURM_JOB_ID of the last task is the id of the whole array."""
    waits = """
    echo "task $SLURM_ARRAY_TASK_ID job $SLURM_JOB_ID attempt ${SLURM_RESTART_COUNT:-0}"
    trap 'exit 75' USR1
    while [ ! -e go ]; do sleep 0.1; done
    """
    jobs = Jobs(slurm, tmp_path, rank(tmp_path, waits))
    array = jobs.submit("--job-name=array", "--array=0-2")
    last = f"{array}_2"
    jobs.wait(last, lambda: jobs.said("array").count("task") == 3)
    assert f"task 2 job {array} attempt 0" in jobs.said("array")
    slurm.ask("scancel", "--signal=USR1", last)
    jobs.wait(last, lambda: f"task 2 job {array} attempt 1" in jobs.said("array"))
    (tmp_path / "go").touch()
    ends = {task: slurm.wait(f"{array}_{task}", "COMPLETED") for task in range(3)}
    assert {task: info["Restarts"] for task, info in ends.items()} == {0: "0", 1: "0", 2: "1"}


def test_gpus_without_a_task_each_are_refused(slurm: Cluster, tmp_path: Path) -> None:
    jobs = Jobs(slurm, tmp_path, rank(tmp_path, "echo started"))
    job = jobs.submit("--job-name=gpus", "--nodes=2", "--gpus-per-node=2")
    assert slurm.wait(job, "FAILED")["ExitCode"] == "2:0"
    assert jobs.said("gpus") == (
        "train.sbatch: 1 tasks but 2 GPUs on a node; give sbatch --ntasks-per-node=2.\n"
    )
