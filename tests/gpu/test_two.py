"""What several GPUs owe each other, over NCCL: one process each."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_train.record.history import read_status
from tests.distributed.ranks import equal, last, same_bits
from tests.processes import Finished, finish
from tests.warm import Process

SPREAD = {"ddp": [], "fsdp": ["parallel.name=fsdp"]}
PARTS = "train.parts=4"


def codes(finished: list[Finished]) -> list[int]:
    return [rank.rc for rank in finished]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("spread", SPREAD)
def test_two_gpus_end_with_the_bits_of_one(
    spread: str,
    precision: str,
    job: list[str],
    cli: Callable[..., Finished],
    ranks: Callable[..., list[Finished]],
    tmp_path: Path,
) -> None:
    words = ["train", *job, PARTS, f"precision={precision}"]
    one = cli(*words, "run.name=one")
    assert one.rc == 0, one
    two = ranks(2, *words, *SPREAD[spread], "run.name=two")
    assert codes(two) == [0, 0], two[0]
    assert same_bits(last(tmp_path, "one"), last(tmp_path, "two"))


@pytest.mark.parametrize("spread", SPREAD)
def test_a_run_killed_on_two_gpus_goes_on_on_two_and_on_one_with_the_same_bits(
    spread: str,
    job: list[str],
    cli: Callable[..., Finished],
    ranks: Callable[..., list[Finished]],
    tmp_path: Path,
) -> None:
    words = ["train", *job, PARTS, *SPREAD[spread]]
    undisturbed = ranks(2, *words, "run.name=undisturbed")
    assert codes(undisturbed) == [0, 0], undisturbed[0]
    for name, processes in (("two", 2), ("one", 1)):
        killed = ranks(2, *words, f"run.name={name}", env={"DIES_AT": 8 * 11})
        assert -9 in codes(killed) and 0 not in codes(killed), killed  # one may notice the other
        ended = ranks(2, *words, f"run.name={name}") if processes == 2 else [cli(*words, f"run.name={name}")]
        assert codes(ended) == [0] * processes, ended[0]
        assert same_bits(last(tmp_path, "undisturbed"), last(tmp_path, name)), name


def test_a_signal_to_one_rank_saves_on_both_at_one_step(
    job: list[str],
    begin_ranks: Callable[..., list[Process]],
    under_way: Callable[..., Process],
    tmp_path: Path,
) -> None:
    words = ["train", *job, "train.steps=1000000", "checkpoint.every=never", "log.every=5"]
    both = begin_ranks(2, *words)
    under_way(both[0])
    both[1].send_signal(signal.SIGUSR1)
    assert codes([finish(rank, 120) for rank in both]) == [75, 75]
    status = read_status(tmp_path / "runs/run")
    assert (status["state"], status["reason"]) == ("interrupted", "SIGUSR1")
    assert last(tmp_path)["step"] == status["step"] > 0


def test_a_rank_that_stands_still_is_named_and_the_job_ends(
    job: list[str],
    begin_ranks: Callable[..., list[Process]],
    under_way: Callable[..., Process],
    tmp_path: Path,
) -> None:
    both = begin_ranks(2, "train", *job, "train.steps=1000000", "log.every=5", "watchdog_seconds=10")
    under_way(both[0])
    both[1].send_signal(signal.SIGSTOP)
    first = finish(both[0], 120)
    assert first.rc == 1, first
    assert "rank 1 came last: nothing was heard of it" in read_status(tmp_path / "runs/run")["reason"]


def test_two_gpus_measure_what_one_does(
    job: list[str], cli: Callable[..., Finished], ranks: Callable[..., list[Finished]], tmp_path: Path
) -> None:
    """37 samples in batches of 7: unequal shares."""
    assert cli("train", *job).rc == 0
    one = cli("eval", "runs/run", "eval.batch_size=7", "--trust")
    two = ranks(2, "eval", "runs/run", "eval.batch_size=7", "--trust")
    assert (one.rc, codes(two)) == (0, [0, 0]), two[0]

    def accuracy(said: str) -> list[str]:
        return [line for line in said.splitlines() if "accuracy" in line]

    assert accuracy(one.out) == accuracy(two[0].out) != []


@pytest.mark.parametrize("spread", SPREAD)
def test_a_sharded_checkpoint_is_read_by_one_process(
    spread: str, job: list[str], cli: Callable[..., Finished], ranks: Callable[..., Any], tmp_path: Path
) -> None:
    words = ["train", *job, PARTS, *SPREAD[spread]]
    assert codes(ranks(2, *words, "run.name=whole")) == [0, 0]
    sharded = ranks(2, *words, "run.name=shards", "checkpoint.sharded=true", "train.steps=12")
    assert codes(sharded) == [0, 0], sharded[0]
    went_on = cli(*words, "run.name=shards", "checkpoint.sharded=false")
    assert went_on.rc == 0, went_on
    one, other = last(tmp_path, "whole"), last(tmp_path, "shards")
    assert equal(one["model"], other["model"]) and one["step"] == other["step"] == 24
    assert all(isinstance(value, torch.Tensor) for value in other["model"].values())
