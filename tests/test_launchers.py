"""What SLURM's variables mean for a process, without SLURM."""

from __future__ import annotations

import re

import pytest

from dist_train.cluster.slurm import check_ranks, first_host, ranks, tasks_on_node
from dist_train.config import UserError
from dist_train.parts import part_size

STEP = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "localhost,other",
    "SLURM_STEP_TASKS_PER_NODE": "2,1", "SLURM_NTASKS": "8",
    "SLURM_JOB_NODELIST": "first,localhost,other",
}  # fmt: skip


def test_a_task_of_a_step_is_a_rank() -> None:
    variables = ranks(STEP)
    port = variables.pop("MASTER_PORT")
    assert variables == {
        "RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "localhost",
    }  # fmt: skip
    changed = [{"SLURM_RESTART_COUNT": "1"}, {"SLURM_JOB_ID": "8"}, {"SLURM_STEP_ID": "1"}]
    assert len({port, *(ranks(STEP | change)["MASTER_PORT"] for change in changed)}) == 4


def test_the_shell_of_an_allocation_is_alone() -> None:
    """SLURM_NTASKS there is what the allocation has room for."""
    assert ranks({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"}) == {}
    assert ranks(STEP | {"SLURM_STEP_NUM_TASKS": "1"}) == {}


@pytest.mark.parametrize(
    "given, sentence",
    [
        ({"RANK": "0", "WORLD_SIZE": "1"}, "srun started 3 tasks, but WORLD_SIZE is 1"),
        ({"RANK": "0", "WORLD_SIZE": "3"}, "RANK is 0 in the task that SLURM numbers 2"),
        ({"RANK": "2", "WORLD_SIZE": "3"}, ""),
        ({"RANK": "0", "WORLD_SIZE": "3", "TORCHELASTIC_RUN_ID": "x"}, ""),  # numbers nodes as it likes
        ({"RANK": "5", "WORLD_SIZE": "6"}, ""),  # a launcher in each task
    ],
)
def test_ranks_that_would_train_alone_are_refused(given: dict[str, str], sentence: str) -> None:
    if not sentence:
        return check_ranks(STEP | given)
    with pytest.raises(UserError, match=sentence):
        check_ranks(STEP | given)


def test_lists_of_nodes_and_tasks() -> None:
    names = {"gpu[003-005,9],x": "gpu003", "a,b[1-2]": "a", "n7": "n7", "r[1,4]-ib": "r1-ib"}
    assert {nodes: first_host(nodes) for nodes in names} == names
    assert [tasks_on_node("2(x2),1", node) for node in range(3)] == [2, 2, 1]


@pytest.mark.parametrize(
    ("batch", "world_size", "accumulate", "told"),
    [
        (7, 1, 2, "by 1 process x 2 accumulation steps"),
        (7, 2, 1, "by 2 processes x 1 accumulation step; use 6 or 8; with 7 it runs on 1, 7 processes"),
        (2, 3, 2, "by 3 processes x 2 accumulation steps; use 6; with 2 it runs on 1 process."),
    ],
)
def test_a_batch_that_cannot_be_divided_is_told_in_plain_english(
    batch: int, world_size: int, accumulate: int, told: str
) -> None:
    with pytest.raises(UserError, match=re.escape(told)):
        part_size(batch, world_size * accumulate, world_size, accumulate)
