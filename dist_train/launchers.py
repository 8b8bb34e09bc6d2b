"""What launchers tell a process: SLURM's rank variables, and what Accelerate was asked for.

torchrun's variables (RANK, WORLD_SIZE, ...) are torch's own and need no translation.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
from itertools import pairwise
from pathlib import Path

from dist_train.config import UserError
from dist_train.keys import key


def slurm_ranks(env: dict[str, str] | os._Environ[str]) -> dict[str, str]:
    """torch's rank variables for a process that `srun` started; empty for any other process."""
    tasks = step_tasks(env)
    if "RANK" in env or tasks < 2:
        return {}
    nodes = env.get("SLURM_STEP_NODELIST", env["SLURM_JOB_NODELIST"])
    one_node = env.get("SLURM_STEP_NUM_NODES", env.get("SLURM_NNODES")) == "1"
    per_node = env.get("SLURM_STEP_TASKS_PER_NODE", env.get("SLURM_TASKS_PER_NODE", "1"))
    # Job, step and attempt choose the port (below the ephemeral ones): two jobs on a node don't
    # meet, and a requeued job doesn't meet what is left of its last attempt.
    attempt = int(env.get("SLURM_RESTART_COUNT", "0"))
    chosen = key(int(env["SLURM_JOB_ID"]), "port", int(env["SLURM_STEP_ID"]), attempt)
    return {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": env["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(tasks_on_node(per_node, int(env["SLURM_NODEID"]))),
        "MASTER_ADDR": env.get("MASTER_ADDR") or ("127.0.0.1" if one_node else address(first_host(nodes))),
        "MASTER_PORT": env.get("MASTER_PORT") or str(15000 + chosen % 15000),
    }


def step_tasks(env: dict[str, str] | os._Environ[str]) -> int:
    """The number of tasks of the step that `srun` started this process in; 0 for any other process.

    The step's own variable comes first: SLURM_NTASKS may be the job's, as in an interactive shell.
    """
    if "SLURM_STEP_ID" not in env:
        return 0
    return int(env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS") or 1)


def check_slurm(env: dict[str, str] | os._Environ[str]) -> None:
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
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["scontrol", "show", "node", host]
        shown = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=30
        ).stdout
        if match := re.search(r"NodeAddr=(\S+)", shown):
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


def asked_of_accelerate() -> int | None:
    """The number of processes that `accelerate launch` was asked for, if it started this one alone.

    Accelerate gives a single child an address to meet the others at, but not their number: that is read
    from the launcher's command line, found among our ancestors, with Accelerate's own parser.
    """
    env = os.environ
    if "WORLD_SIZE" in env or not {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"} <= env.keys():
        return None
    import psutil
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    try:
        for process in psutil.Process().parents():
            words = process.cmdline()
            arguments = _after_launch(words)
            if arguments is None:
                continue
            args = launch_command_parser().parse_args(arguments)
            file = os.path.join(process.cwd(), args.config_file or default_config_file)
            if args.num_processes is None and os.path.isfile(file):
                return int(load_config_from_file(file).num_processes)
            return args.num_processes
    except (psutil.Error, OSError, ValueError, SystemExit):
        pass  # a foreign or vanished ancestor: nothing can be known
    return None


def _after_launch(words: list[str]) -> list[str] | None:
    """The arguments of `accelerate launch` in a command line; None if it is another program's."""
    names = ["", *(Path(word).name.removesuffix(".py") for word in words)]
    for position, (before, name) in enumerate(pairwise(names), 1):
        if name in ("accelerate-launch", "accelerate.commands.launch") or (
            name == "launch" and before in ("accelerate", "accelerate.commands.accelerate_cli")
        ):
            return words[position:]
    return None


def was_launched(env: dict[str, str] | os._Environ[str]) -> bool:
    """Whether torchrun or `accelerate launch` started this process, so that its parent is the launcher."""
    return "TORCHELASTIC_RUN_ID" in env or "ACCELERATE_MIXED_PRECISION" in env


def slurm_job(env: dict[str, str] | os._Environ[str]) -> str | None:
    """This SLURM job as `squeue` names it: 12, or 31_1 for a task of an array; None outside of a job."""
    if "SLURM_ARRAY_JOB_ID" in env:
        return f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    return env.get("SLURM_JOB_ID")
