"""SLURM: what its variables and its commands tell of a process, a job, and a queue.

Nothing else reads a variable of SLURM's or asks `scontrol` and `squeue`. Each function takes the environment,
so that its decision can be tested without SLURM.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from datetime import datetime

from dist_train.config import UserError
from dist_train.seeds import key

SHOWN = ("JOB_ID", "ARRAY_TASK_ID", "NNODES", "NTASKS", "PROCID", "CPUS_PER_TASK", "GPUS_ON_NODE")


def ranks(env: Mapping[str, str]) -> dict[str, str]:
    """torch's rank variables for a process that `srun` started; empty for any other process."""
    tasks = step_tasks(env)
    if "RANK" in env or tasks < 2:
        return {}
    nodes = env.get("SLURM_STEP_NODELIST", env["SLURM_JOB_NODELIST"])
    one_node = env.get("SLURM_STEP_NUM_NODES", env.get("SLURM_NNODES")) == "1"
    per_node = env.get("SLURM_STEP_TASKS_PER_NODE", env.get("SLURM_TASKS_PER_NODE", "1"))
    # Job, step and attempt choose the port (below the ephemeral ones): two jobs on a node don't
    # meet, and a requeued job doesn't meet what is left of its last attempt.
    chosen = key(int(env["SLURM_JOB_ID"]), "port", int(env["SLURM_STEP_ID"]), restarts(env))
    return {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": env["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks_on_node(per_node, int(env["SLURM_NODEID"]))),
        "MASTER_ADDR": env.get("MASTER_ADDR") or ("127.0.0.1" if one_node else address(first_host(nodes))),
        "MASTER_PORT": env.get("MASTER_PORT") or str(15000 + chosen % 15000),
    }


def step_tasks(env: Mapping[str, str]) -> int:
    """The number of tasks of the step that `srun` started this process in; 0 for any other process.

    The step's own variable comes first: SLURM_NTASKS may be the job's, as in an interactive shell.
    """
    if "SLURM_STEP_ID" not in env:
        return 0
    return int(env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS") or 1)


def check_ranks(env: Mapping[str, str]) -> None:
    """Raises UserError where the ranks of an `srun` are not one world: each would train alone.

    So it is when RANK and WORLD_SIZE were set before `srun`: the shell fills in its own numbers, once.
    """
    tasks, world_size = step_tasks(env), int(env.get("WORLD_SIZE", "1"))
    if world_size < tasks:
        raise UserError(
            f"srun started {tasks} tasks, but WORLD_SIZE is {world_size};"
            " leave RANK and WORLD_SIZE unset: they come from SLURM."
        )
    by_hand = 1 < tasks == world_size and "TORCHELASTIC_RUN_ID" not in env
    if by_hand and env["RANK"] != env["SLURM_PROCID"]:
        raise UserError(
            f"RANK is {env['RANK']} in the task that SLURM numbers {env['SLURM_PROCID']};"
            " leave RANK and WORLD_SIZE unset: they come from SLURM."
        )


def first_host(nodelist: str) -> str:
    """The first host of a SLURM node list: `gpu[003-005,9],x` -> `gpu003`."""
    head, bracket, rest = nodelist.partition("[")
    if not bracket or "," in head:
        return nodelist.split(",")[0]
    inside, _, tail = rest.partition("]")
    return head + inside.replace("-", ",").split(",")[0] + tail.split(",")[0]


def address(host: str) -> str:
    """The host's name where it can be resolved, else the address that SLURM knows it by.

    Raises UserError if there is neither: with a fallback to localhost each node would train alone.
    """
    try:
        socket.getaddrinfo(host, None)
        return host
    except OSError:
        pass
    if match := re.search(r"NodeAddr=(\S+)", _asked("scontrol", "show", "node", host)):
        with contextlib.suppress(OSError):
            socket.getaddrinfo(match[1], None)
            return match[1]
    raise UserError(f"the address of the first node, {host}, can't be found; set MASTER_ADDR to it.")


def tasks_on_node(per_node: str, node: int) -> int:
    """The number of tasks on a node, from SLURM's `2(x3),1`."""
    counts: list[int] = []
    for item in per_node.split(","):
        count, _, times = item.partition("(x")
        counts += [int(count)] * int(times.rstrip(")") or 1)
    return counts[node]


def job_name(env: Mapping[str, str]) -> str | None:
    """This SLURM job as `squeue` names it: 12, or 31_1 for a task of an array; None outside of a job."""
    if "SLURM_ARRAY_JOB_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env.get("SLURM_JOB_ID")


def restarts(env: Mapping[str, str]) -> int:
    """How often SLURM has requeued this job."""
    return int(env.get("SLURM_RESTART_COUNT", "0"))


def task(env: Mapping[str, str]) -> str | None:
    """The number of this task in its step, which becomes its rank; None where `srun` started nothing."""
    return env.get("SLURM_PROCID")


def end_time(env: Mapping[str, str]) -> float | None:
    """When SLURM will end this job, as time.time(), or None where that is not known."""
    if (job := job_name(env)) is None:
        return None
    if env.get("SLURM_JOB_END_TIME", "").isdigit():
        return float(env["SLURM_JOB_END_TIME"])
    found = re.search(r"\bEndTime=(\S+)", _asked("scontrol", "show", "job", "--oneliner", job))
    with contextlib.suppress(ValueError):  # "Unknown"
        return datetime.fromisoformat(found[1]).timestamp() if found else None
    return None


def states(jobs: Sequence[str]) -> dict[str, str]:
    """SLURM's state of each job, as RUNNING; ENDED if its queue holds it no more; empty if it can't tell."""
    if not jobs or not shutil.which("squeue"):
        return {}
    words = ["squeue", "--noheader", "--array", "--format=%i %T", f"--jobs={','.join(sorted(set(jobs)))}"]
    try:
        asked = subprocess.run(words, capture_output=True, encoding="utf-8", errors="replace", timeout=20)
    except (OSError, subprocess.SubprocessError):
        return {}
    # It knows ended jobs for some minutes; asked for one that it has forgotten, it fails.
    if asked.returncode and "Invalid job id" not in asked.stderr:
        return {}
    known = dict(line.split(maxsplit=1) for line in asked.stdout.splitlines() if len(line.split()) > 1)
    return {job: known.get(job, "ENDED") for job in jobs}


def describe(env: Mapping[str, str]) -> str:
    """In words whether this is a job, and of which size, or whether one can be submitted from here."""
    found = [f"{name}={env[f'SLURM_{name}']}" for name in SHOWN if f"SLURM_{name}" in env]
    if "SLURM_JOB_ID" in env:
        return f"in a job: {' '.join(found)}"
    return "sbatch is here: dist-train submit" if shutil.which("sbatch") else "none on this machine"


def _asked(*words: str) -> str:
    """What one of SLURM's commands prints; nothing where it is missing or does not answer in 20 s."""
    try:
        return subprocess.run(
            words, capture_output=True, encoding="utf-8", errors="replace", timeout=20
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
