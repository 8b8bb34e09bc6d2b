"""Models sharded over ranks (FSDP2): the bits of one process and of DDP, in whatever way a run goes on."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dist_train import checkpoint
from dist_train.config import Config, UserError
from tests.distributed.ranks import same_bits, start, train, train_command
from tests.worlds import SMALL, write_npz

# A short last batch; the eval set can't be divided evenly; a part has 4 samples.
BASE = [*SMALL, "threads=1", "train.parts=4", "train.steps=8", "train.clip_norm=0.5", "train.ema=0.9",
        "optim.lr=0.01", "eval.batch_size=5", "checkpoint.every=4", "checkpoint.best=none"]  # fmt: skip
MLP = ["model.name=mlp", "model.args.hidden=[24,16]", "model.args.dropout=0.2"]
CNN = ["model.name=cnn"]
# The CPU's fused kernels round the last few numbers of a tensor otherwise: see docs/parallel.md.
ADAMW = ["optim.name=AdamW", "optim.args.fused=false"]
SGD = ["optim.name=SGD", "optim.args.momentum=0.9", "optim.args.fused=false"]
GROUPS = ["optim.no_decay=[biases]", "optim.layer_decay=0.7", "train.clip_value=0.05"]
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


@pytest.mark.parametrize(
    "words",
    [[*MLP, *ADAMW, *GROUPS], pytest.param([*CNN, *SGD], marks=pytest.mark.long)],
    ids=["mlp-adamw", "cnn-sgd"],
)
def test_a_sharded_model_ends_with_the_bits_of_one_process_and_of_ddp(
    words: list[str], tmp_path: Path
) -> None:
    words = [*words, "log.histograms=true"]
    one, *others = runs(
        tmp_path, words, ("one", 1, []), ("ddp", 2, []), ("two", 2, [FSDP]), ("four", 4, [FSDP])
    )
    for other in others:
        assert same_bits(one, other)
    shown = [(tmp_path / "runs" / name / "histograms.jsonl").read_text() for name in ("one", "ddp", "four")]
    assert shown[0] == shown[1] == shown[2]
    newest = json.loads(shown[0].splitlines()[-1])["weights"]
    assert {name: sum(each["counts"]) for name, each in newest.items()} == {
        name: weight.numel() for name, weight in one["average"].items() if name in newest
    }
    exported = [(tmp_path / "runs" / name / "model.safetensors").read_bytes() for name in ("one", "four")]
    assert exported[0] == exported[1]


@pytest.mark.long
def test_a_run_goes_on_from_ddp_to_fsdp_and_back_and_from_one_file_to_parts_and_back(tmp_path: Path) -> None:
    words = [*CNN, *ADAMW, "run.name=moved"]
    (straight,) = runs(tmp_path, [*CNN, *ADAMW], ("straight", 1, ["train.steps=16"]))
    for steps, processes, further in (
        (4, 1, []),
        (6, 2, [FSDP]),
        (8, 4, [FSDP, SHARDED]),
        (10, 2, [FSDP, SHARDED]),
        (12, 2, [SHARDED]),  # DDP, in parts
        (14, 2, []),
        (16, 1, [SHARDED]),
    ):
        train(tmp_path, *BASE, *words, f"train.steps={steps}", *further, processes=processes)
        newest = checkpoint.newest_first(tmp_path / "runs/moved/checkpoints")[0]
        assert newest.suffix == (".sharded" if SHARDED in further else ".pt")
        assert checkpoint.step_of(newest) == steps
    assert same_bits(straight, state(tmp_path, "moved"))


def test_a_complete_run_in_parts_says_so_and_is_evaluated_by_one_process(tmp_path: Path) -> None:
    from dist_train.predict import evaluate_run, load_model
    from dist_train.tools.export import export

    (saved,) = runs(
        tmp_path, [*MLP, *ADAMW], ("parts", 2, [FSDP, SHARDED, "checkpoint.best=max eval/accuracy"])
    )
    run = tmp_path / "runs/parts"
    folder = run / "checkpoints"
    assert {path.suffix for path in folder.iterdir()} == {".sharded"}
    best = checkpoint.load(folder / "best.sharded")
    assert load_model(run)[1]["step"] == best["step"] == saved["best_step"]
    measured = evaluate_run(folder / "last.sharded", ["device=cpu", f"data.root={tmp_path}/arrays.npz"])
    assert measured == pytest.approx(saved["metrics"])
    alone, where = tmp_path / "alone.safetensors", [f"data.root={tmp_path}/arrays.npz"]
    assert export(folder / "last.sharded", "safetensors", alone, overrides=where).difference == 0
    assert evaluate_run(alone, ["device=cpu", *where]) == measured
    train(
        tmp_path,
        *BASE,
        *MLP,
        *ADAMW,
        "run.name=parts",
        FSDP,
        SHARDED,
        "checkpoint.best=max eval/accuracy",
        processes=2,
    )
    assert "The run is complete" in (tmp_path / "rank0.out").read_text()


@pytest.mark.parametrize("samples", [1, *(pytest.param(n, marks=pytest.mark.long) for n in (3, 37))])
def test_evaluation_counts_each_sample_once_also_where_ranks_get_unequal_shares(
    samples: int, tmp_path: Path
) -> None:
    words = [*MLP, *SGD, "eval.batch_size=1", "train.steps=2", "train.parts=2"]
    write_npz(tmp_path)
    import numpy as np

    held = dict(np.load(tmp_path / "arrays.npz"))
    np.savez(tmp_path / "few.npz", **{n: v[:samples] if "test" in n else v for n, v in held.items()})
    found = []
    for name, processes, further in (("one", 1, []), ("two", 2, [FSDP])):
        where = ["data.root=few.npz", f"run.name={name}"]
        train(tmp_path, *BASE, *words, *where, *further, processes=processes)
        found.append(state(tmp_path, name)["metrics"])
    assert found[0] == found[1]
    assert round(found[0]["eval/accuracy"] * samples, 9) in range(samples + 1)


@pytest.mark.long
def test_two_replicas_of_two_shards_and_recomputed_blocks_keep_the_bits(tmp_path: Path) -> None:
    one, *others = runs(
        tmp_path,
        [*MLP, *ADAMW],
        ("one", 1, []),
        ("replicas", 4, [FSDP, "parallel.mesh=[2,2]"]),
        ("recomputed", 2, [FSDP, "parallel.recompute=true", "parallel.offload=true"]),
        ("wrapped", 2, [FSDP, "parallel.wrap=[1*]"]),
    )
    for other in others:
        assert same_bits(one, other)


@pytest.mark.parametrize("optimizer", ["SGD", "Adagrad", "AdamW"])
def test_optimizers_step_on_shards_by_the_kernel_that_torch_has_for_them(
    optimizer: str, tmp_path: Path
) -> None:
    words = [*MLP, f"optim.name={optimizer}", "optim.args={}", "train.steps=2"]
    one, two = runs(tmp_path, words, ("one", 1, []), ("two", 2, [FSDP]))
    for name, value in one["model"].items():
        assert (value - two["model"][name]).abs().max() < 1e-6


@pytest.mark.long
def test_bf16_has_the_same_bits_also_where_weights_are_gathered_so(tmp_path: Path) -> None:
    words = [*CNN, *SGD, "precision=bf16", "train.steps=4"]
    ways = [("whole", 2, [FSDP]), ("half", 2, [FSDP, "parallel.gather=bf16"])]
    ddp, *others = runs(tmp_path, words, ("ddp", 2, []), *ways)
    for other in others:  # convolutions and linear layers take weights in bf16 anyway
        assert same_bits(ddp, other)


@pytest.mark.parametrize("optimizer", ["SGD", "Adagrad", "AdamW"])
def test_an_optimizer_needs_no_fused_kernel_for_shards(optimizer: str, tmp_path: Path) -> None:
    (saved,) = runs(tmp_path, [*MLP, f"optim.name={optimizer}", "train.steps=2"], ("two", 2, [FSDP]))
    assert saved["step"] == 2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["parallel.mesh=[2,2]"], "2 replicas of 2 shards are not 2 processes"),
        (["parallel.wrap=[nothing.*]"], "no part of the model is named like 'nothing.*'"),
        (["precision=fp16"], "precision: fp16 does not work with parallel.name=fsdp"),
        (["parallel.gather=bf16"], "parallel.gather: bf16 is for precision=bf16"),
        (
            ["parallel.recompute=nothing.*"],
            "parallel.recompute: no part of the model is named like 'nothing.*'",
        ),
        (["parallel.name=fdsp"], "did you mean 'fsdp'"),
        (["optim.name=Adafactor"], "optim.name: Adafactor does not work with parallel.name=fsdp"),
        (["optim.name=Muon"], "does not work with parallel.name=fsdp: Muon needs whole matrices"),
    ],
)
def test_what_does_not_work_with_it_is_told_in_a_sentence(
    words: list[str], told: str, tmp_path: Path
) -> None:
    write_npz(tmp_path)
    train(tmp_path, *BASE, *MLP, FSDP, *words, processes=2, expect=2)
    output = "".join((tmp_path / f"rank{rank}.out").read_text() for rank in range(2))
    assert told in re.sub(r"\s+", " ", output)
    assert "Traceback" not in output


def test_a_torch_that_cannot_add_up_in_order_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from dist_train import fsdp

    monkeypatch.setattr(fsdp, "FSDPModule", type("Old", (), {}))
    model = object.__new__(fsdp.Sharded)
    model.config, model.in_order = Config(), True
    with pytest.raises(UserError, match="can't add up the gradients of a sharded model in a fixed order"):
        model._spread()


STOPS = """
import os, pathlib, signal
from dist_train.tasks import Classification

class Stops(Classification):
    # Rank 1 alone is asked to stop, in the middle of an evaluation after the first step; or killed.
    def loss(self, outputs, targets):
        mark = pathlib.Path("armed")
        if mark.exists() and os.environ.get("RANK") == "1" and outputs.requires_grad:
            type(self).steps = getattr(self, "steps", 0) + 1
            if self.steps == int(mark.read_text()):
                mark.unlink()
                os.kill(os.getpid(), signal.SIGKILL)
        return super().loss(outputs, targets)

    def metrics(self, outputs, targets):
        mark = pathlib.Path("asked")
        began = pathlib.Path("runs/run/metrics.jsonl").exists()
        if began and mark.exists() and os.environ.get("RANK") == "1":
            mark.unlink()
            os.kill(os.getpid(), signal.SIGTERM)
        return super().metrics(outputs, targets)
"""


@pytest.mark.long
def test_a_sharded_run_that_is_killed_and_interrupted_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(STOPS)
    words = [*BASE, *CNN, *ADAMW, FSDP, SHARDED, "task.name=mine:Stops", "checkpoint.every=3", "eval.every=4"]
    words += ["train.parts=2", "timeout_seconds=60"]
    write_npz(tmp_path)
    train(tmp_path, *words, "run.name=undisturbed", processes=2)
    (tmp_path / "armed").write_text("5")
    ranks = start(train_command(*words), 2, tmp_path)
    assert [rank.wait(timeout=120) for rank in ranks] == [1, -9]
    (tmp_path / "asked").touch()
    train(tmp_path, *words, processes=2, expect=75)
    assert not (tmp_path / "asked").exists()
    train(tmp_path, *words, processes=2)
    assert same_bits(state(tmp_path, "undisturbed"), state(tmp_path, "run"))
    assert not list((tmp_path / "runs/run/checkpoints").glob("*.tmp"))
