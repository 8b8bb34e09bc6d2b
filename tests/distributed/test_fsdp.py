"""Models sharded over ranks (FSDP2): the bits of one process and of DDP, in whatever way a run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dist_train import checkpoint
from tests.distributed.ranks import same_bits, train
from tests.worlds import SMALL, write_npz

# A short last batch; the eval set can't be divided evenly; a part has 4 samples.
BASE = [*SMALL, "threads=1", "train.parts=4", "train.steps=8", "train.clip_norm=0.5", "train.ema=0.9",
        "optim.lr=0.01", "eval.batch_size=5", "checkpoint.every=4", "checkpoint.best=none"]  # fmt: skip
MLP = ["model.name=mlp", "model.args.hidden=[24,16]", "model.args.dropout=0.2"]
CNN = ["model.name=cnn"]
# The CPU's fused kernels round the last few numbers of a tensor otherwise: see docs/parallel.md.
ADAMW = ["optim.name=AdamW", "optim.args.fused=false"]
SGD = ["optim.name=SGD", "optim.args.momentum=0.9", "optim.args.fused=false"]
FSDP = "parallel.name=fsdp"
SHARDED = "checkpoint.sharded=true"


def state(cwd: Path, name: str) -> dict[str, Any]:
    """The newest state of a run, whole."""
    folder = cwd / "runs" / name / "checkpoints"
    return checkpoint.load(checkpoint.newest_first(folder)[0])


def runs(cwd: Path, words: list[str], *ways: tuple[str, int, list[str]]) -> list[dict[str, Any]]:
    """The last states of runs (name, processes, words), each trained to its end."""
    write_npz(cwd)
    for name, processes, further in ways:
        train(cwd, *BASE, *words, f"run.name={name}", *further, processes=processes)
    return [state(cwd, name) for name, *_ in ways]


@pytest.mark.parametrize("words", [[*MLP, *ADAMW], [*CNN, *SGD]], ids=["mlp-adamw", "cnn-sgd"])
def test_a_sharded_model_ends_with_the_bits_of_one_process_and_of_ddp(
    words: list[str], tmp_path: Path
) -> None:
    one, *others = runs(
        tmp_path, words, ("one", 1, []), ("ddp", 2, []), ("two", 2, [FSDP]), ("four", 4, [FSDP])
    )
    for other in others:
        assert same_bits(one, other)
    exported = [(tmp_path / "runs" / name / "model.safetensors").read_bytes() for name in ("one", "four")]
    assert exported[0] == exported[1]
