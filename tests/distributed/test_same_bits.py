"""The same bits on any number of processes: parts of a step, added up in one tree."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from dist_train.record.history import read_metrics
from dist_train.tree import Subtrees, sum_over_ranks, tree_sum
from tests.distributed.group import Group, on_ranks
from tests.distributed.ranks import ROOT, equal, last, train
from tests.worlds import SMALL as WORLD
from tests.worlds import write_npz

SAMPLE = f"data.root={ROOT / 'dist_train' / 'assets'}"
COMMON = [
    SAMPLE, "train.parts=4", "train.batch_size=40", "train.steps=12", "log.every=4", "train.clip_norm=0.5",
    "train.ema=0.9", "eval.batch_size=300",
]  # fmt: skip
MLP = ["model.args={hidden: [32], dropout: 0.3}"]
CNN = ["model.name=cnn", "model.args={widths: [8, 16], dropout: 0.2}"]
SGD = ["optim.args={momentum: 0.9}", "optim.lr=0.05"]
ADAMW = ["optim.name=AdamW", "optim.lr=0.003"]
MUON = ["optim.name=Muon", "optim.lr=0.02", "optim.args.rest={AdamW: {lr: 0.003}}"]


def _what_came_out(folder: Path, name: str) -> tuple[object, ...]:
    """All that must not depend on the number of processes: the state, and the rows but for their seconds."""
    state = last(folder, name)
    parts = [state[part] for part in ("model", "average", "optimizer", "metrics", "best", "window")]
    rows = [
        {k: v for k, v in row.items() if k != "time" and not k.startswith("perf/")}
        for row in read_metrics(folder / "runs" / name)
    ]
    return (*parts, rows)


@pytest.mark.parametrize(
    "job",
    [
        CNN + MUON,
        pytest.param(CNN + SGD + ["train.parts=8"], marks=pytest.mark.long),
    ],
    ids=["cnn muon", "cnn sgd, 8 parts"],
)
def test_one_two_and_four_processes_give_the_same_bits(tmp_path: Path, job: list[str]) -> None:
    for processes in (1, 2, 4):
        train(tmp_path, *COMMON, *job, f"run.name=w{processes}", processes=processes)
    one = _what_came_out(tmp_path, "w1")
    for name in ("w2", "w4"):
        assert equal(one, _what_came_out(tmp_path, name)), name


def test_parts_that_a_short_batch_leaves_empty_count_nowhere(tmp_path: Path) -> None:
    """402 samples in batches of 40: the eleventh step has two, for four parts."""
    (tmp_path / "mine.py").write_text(
        "from torch.utils.data import Subset\n"
        "from dist_train.data.fashion_mnist import fashion_mnist\n"
        "def data(root, train):\n"
        "    whole = fashion_mnist(root, train=train)\n"
        "    cut = Subset(whole, range(402 if train else 50))\n"
        "    cut.classes = whole.classes\n"
        "    return cut\n"
    )
    job = [*COMMON, *CNN, *ADAMW, "data.name=mine:data"]
    for processes in (1, 2, 4):
        train(tmp_path, *job, f"run.name=w{processes}", processes=processes)
    one = _what_came_out(tmp_path, "w1")
    for name in ("w2", "w4"):
        assert equal(one, _what_came_out(tmp_path, name)), name


WEIGHED = """
import torch
from dist_train.tasks import SampleTask

class Weighed(SampleTask):
    # Some samples count more than others, and some batches nothing at all.
    def losses(self, model, batch):
        values = torch.nn.functional.cross_entropy(model(batch.inputs), batch.targets, reduction="none")
        right = (values < 2.3).float()
        return values, (batch.targets % 3).float(), {"hits": right}

    def loss(self, outputs, targets):
        return torch.nn.functional.cross_entropy(outputs, targets, reduction="none")
"""


def test_weights_of_losses_are_exact_on_any_number_of_processes(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(WEIGHED)
    job = [*COMMON, *MLP, *SGD, "task.name=mine:Weighed", "model.args.dropout=0", "train.clip_norm=0"]
    for processes in (1, 2, 4):
        train(tmp_path, *job, f"run.name=w{processes}", processes=processes)
    one = _what_came_out(tmp_path, "w1")
    for name in ("w2", "w4"):
        assert equal(one, _what_came_out(tmp_path, name)), name
    rows = read_metrics(tmp_path / "runs" / "w1")
    assert all(0 <= row["train/hits"] <= 1 for row in rows if row["kind"] == "train")
    assert all(0 < row["train/weight"] < 2 * 4 * 40 for row in rows if row["kind"] == "train")
    train(tmp_path, *job, "train.parts=1", "run.name=whole")  # one part: the plain weighted mean
    a, b = last(tmp_path, "w1"), last(tmp_path, "whole")
    for name, value in a["model"].items():
        assert torch.allclose(value, b["model"][name], rtol=1e-4, atol=1e-6)


@pytest.mark.long
def test_ddp_adds_up_by_itself_where_that_is_wanted(tmp_path: Path) -> None:
    job = [*COMMON, *MLP, *SGD, "train.same_bits=false"]
    for processes in (1, 4):
        train(tmp_path, *job, f"run.name=w{processes}", processes=processes)
    train(tmp_path, *COMMON, *MLP, *SGD, "run.name=tree")
    tree = last(tmp_path, "tree")
    for name in ("w1", "w4"):
        state = last(tmp_path, name)
        for key, value in tree["model"].items():
            assert torch.allclose(value, state["model"][key], rtol=1e-3, atol=1e-5)


def test_a_growing_tree_has_the_bits_of_the_whole_one() -> None:
    generator = torch.Generator().manual_seed(0)
    for count in itertools.chain(range(1, 20), (32, 33)):
        terms = [torch.randn(7, generator=generator) * 10 ** (number % 7) for number in range(count)]
        tree = Subtrees()
        for term in terms[:-1]:
            tree.add([term.clone(), None])
            assert len(tree) <= count.bit_length()
        total, nothing = tree.close([terms[-1].clone(), None])
        assert nothing is None and len(tree) == 0
        assert total is not None and torch.equal(total, tree_sum(terms)), count


def test_a_row_tells_its_kind_and_what_the_step_left(tmp_path: Path) -> None:
    train(tmp_path, *COMMON, *MLP, *SGD)
    rows = [json.loads(line) for line in (tmp_path / "runs/run/metrics.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["train", "train", "train", "eval"]
    assert all(row["train/grad_norm"] > 0 and row["perf/memory_gb"] > 0 for row in rows[:3])


def _add_up(group: Group) -> None:
    generator = torch.Generator().manual_seed(group.rank)
    values = torch.randn(13, generator=generator) * 10**group.rank
    expected = tree_sum(group.gather(values))
    assert torch.equal(sum_over_ranks(values.clone(), group.world_size), expected)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_shards_of_all_ranks_are_added_up_in_the_order_of_ranks(tmp_path: Path, world_size: int) -> None:
    assert on_ranks(world_size, _add_up, cwd=tmp_path) == [0] * world_size


@pytest.mark.long
def test_a_run_of_other_weights_with_frozen_layers_has_the_same_bits_however_it_is_spread(
    tmp_path: Path,
) -> None:
    """The frozen layers, BatchNorm among them, are trained from step 3 on; each run goes over that."""
    write_npz(tmp_path)
    words = [
        *WORLD, "threads=1", "train.parts=4", "train.steps=6", "train.clip_norm=0.5", "train.ema=0.9", *CNN,
        "optim.name=AdamW", "optim.args.fused=false", "checkpoint.best=none", "log.every=1",
    ]  # fmt: skip
    train(tmp_path, *words, "run.name=before", "seed=5", "train.steps=2")
    words += ["model.init=runs/before", "model.freeze=['*', '!13']", "model.freeze_until=3"]
    train(tmp_path, *words, "run.name=one")
    train(tmp_path, *words, "run.name=fsdp", "parallel.name=fsdp", processes=2)
    train(tmp_path, *words, "run.name=moved", "train.steps=2", processes=2)
    (tmp_path / "runs/before").rename(tmp_path / "gone")  # what goes on reads nothing from there
    train(tmp_path, *words, "run.name=moved", processes=4)
    one, fsdp, moved = (_what_came_out(tmp_path, name) for name in ("one", "fsdp", "moved"))
    assert equal(one, fsdp)
    assert equal(one[:-1], moved[:-1])  # whose rows tell of one evaluation more
    averages = last(tmp_path, "one")["model"]
    assert averages["1.num_batches_tracked"] == 2 + 3  # of the run before, and of the steps from 3 on


NOTHING = """
import torch
from dist_train.tasks import SampleTask

class Nothing(SampleTask):
    # Every step but the first one weighs nothing: all pixels ignored, say.
    steps = 0

    def loss(self, outputs, targets):
        return torch.nn.functional.cross_entropy(outputs, targets, reduction="none")

    def losses(self, model, batch):
        values = self.loss(model(batch.inputs), batch.targets)
        return values, torch.full_like(values, float(batch.part.step < 1))
"""


def test_a_step_in_which_nothing_counts_changes_no_row_and_ends_no_run(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(NOTHING)
    job = [*COMMON, *MLP, "optim.lr=0.05", "task.name=mine:Nothing", "train.ema=0"]
    train(tmp_path, *job)
    first, *others = (row for row in read_metrics(tmp_path / "runs/run") if row["kind"] == "train")
    assert first["train/loss"] > 0 and first["train/weight"] == 40
    assert [row["train/loss"] for row in others] == [None, None]
    assert [row["train/weight"] for row in others] == [0, 0]


@pytest.mark.long
@pytest.mark.parametrize(("parts", "processes"), [(3, 3), (6, 3), (5, 5), (12, 3)])
def test_numbers_of_processes_that_are_no_powers_of_two_give_the_same_bits_too(
    tmp_path: Path, parts: int, processes: int
) -> None:
    job = [*COMMON, *CNN, *ADAMW, f"train.parts={parts}", "train.batch_size=60"]
    for count in (1, processes):
        train(tmp_path, *job, f"run.name=w{count}", processes=count)
    assert equal(_what_came_out(tmp_path, "w1"), _what_came_out(tmp_path, f"w{processes}"))


def test_an_evaluation_later_on_another_number_of_processes_has_the_bits_of_the_run(tmp_path: Path) -> None:
    from dist_train.predict import evaluate_run

    job = [*COMMON, *CNN, *ADAMW, "train.parts=null", "eval.batch_size=null"]
    train(tmp_path, *job, processes=2)
    found = evaluate_run(tmp_path / "runs/run/checkpoints/last.pt", ["threads=1"])
    assert found == last(tmp_path)["metrics"]
