"""What a job would take, and which rate and batch suit it, before it is run: nothing is left behind."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dist_train import load, optim
from dist_train.config import UserError
from dist_train.data import build
from dist_train.models import mlp
from dist_train.record.history import read_metrics
from dist_train.tools import find_batch_size as finding
from dist_train.tools.estimate import estimate
from dist_train.tools.find_batch_size import Tried, by_growth, by_trying, cgroup_left, find_batch_size
from dist_train.tools.find_lr import find_lr, told
from tests.processes import Finished
from tests.worlds import SMALL, pictures

SHORT = [word for word in SMALL if not word.startswith("data.root")]


@pytest.mark.long
def test_rates_that_rise_give_a_curve_a_suggestion_and_no_run(
    cli: Callable[..., Finished], ranks: Callable[..., list[Finished]], small: list[str], tmp_path: Path
) -> None:
    before = {path.name for path in tmp_path.iterdir()}
    rates = ["--steps", 60, "--lowest", 1e-4, "--highest", 1e3]
    finished, other = ranks(2, "find-lr", *small, *rates)
    assert (finished.rc, other.rc, other.out, other.err) == (0, 0, "", ""), (finished, other)
    match = re.match(
        r"suggestion: optim.lr=(\S+), a tenth of the rate .*\nwritten: find-lr.png", finished.out
    )
    assert match, finished
    rate = float(match[1])
    assert {path.name for path in tmp_path.iterdir()} - before == {"find-lr.png"}
    assert Image.open(tmp_path / "find-lr.png").size == (840, 480)
    trained = cli("train", *small, "train.steps=30", f"optim.lr={rate}")
    assert trained.rc == 0, trained
    assert read_metrics(tmp_path / "runs/run")[-1]["eval/accuracy"] > 0.9  # of three classes


@pytest.mark.long
def test_a_rate_is_not_suggested_where_the_test_shows_none(small: list[str], npz: Path) -> None:
    low = find_lr(load([], small), 30, 1e-6, 1e-3)
    assert low and low.suggestion is None
    assert "the loss hardly fell; give a higher --highest" in told(low)
    rising = find_lr(load([], small), 60, 1e-3, 0.3)
    assert rising and "at 0.3 the loss still falls" in told(rising)
    wild = find_lr(load([], small), 100, 1e-4, 1e6)
    assert wild and len(wild.rates) < 100  # it ends where the loss blows up
    assert wild.suggestion and wild.suggestion < wild.rates[-1] / 10
    with pytest.raises(UserError, match="--lowest"):
        find_lr(load([], small), 30, 1.0, 0.1)
    with pytest.raises(UserError, match=r"optim\.lr: is 0"):
        find_lr(load([], [*small, "optim.lr=0"]), 30, 0.1, 1.0)


@pytest.mark.parametrize("fits", [1, 3, 100, 12_345])
def test_a_size_is_found_by_trying_to_a_sixteenth(fits: int) -> None:
    tried = []

    def train(size: int) -> Tried | None:
        tried.append(size)
        return Tried(size, size, 1.0) if size <= fits else None

    assert fits * 15 / 16 - 1 < by_trying(train, 1_000_000).size <= fits
    assert len(tried) < 25
    assert by_trying(train, fits).size == fits
    with pytest.raises(UserError, match="not even one"):
        by_trying(lambda size: None, 10)


def test_a_memory_of_less_than_two_samples_or_than_the_model_is_told(
    small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    norm = torch.nn.BatchNorm1d(3)

    def train(size: int) -> None:
        if size == 1:
            norm(torch.rand(1, 3))

    with pytest.raises(UserError, match=r"2 samples don't fit .* trained on one: Expected more than 1 value"):
        by_trying(train, 10)
    with pytest.raises(UserError, match=r"2 samples take 0.50 of 0.40 GB"):
        by_growth(lambda size: Tried(size, 0.5, 1.0), 100, limit=0.4)
    large = [*small, "model.args.hidden=[90000,90000]"]  # 32 GB of weights, and as much of gradients
    told = r"the model, its gradients and its optimizer take 64.\d GB, and \S+ GB may be used"
    monkeypatch.setattr(finding, "cgroup_left", lambda: 1e6)
    with pytest.raises(UserError, match=told):
        find_batch_size(load([], large))


def test_a_teacher_takes_memory_on_each_process(small: list[str], here: Callable[..., Any]) -> None:
    here(*small, "train.steps=1", "run.name=teacher", "model.args={hidden: [64]}")
    found = estimate(load([], [*small, "task.teacher=runs/teacher"]), processes=2)
    taught = 4 * (64 * 64 + 64 + 64 * 3 + 3)
    assert [memory["teacher"] for memory in found.memory.values()] == [taught, taught]


def test_a_size_is_found_by_growth_without_filling_the_memory() -> None:
    largest = 0.0

    def train(size: int) -> Tried:
        nonlocal largest
        largest = max(largest, 0.5, 0.3 + 0.002 * size)  # GB, of which the first 0.5 were there before
        return Tried(size, round(largest, 3), 0.1)

    found = by_growth(train, 1_000_000, limit=8.0)
    assert largest < 4
    assert found.size == pytest.approx((8 - 0.3) / 0.002, rel=0.03)
    assert by_growth(train, 50, limit=8.0).size == 50


def test_a_model_with_batchnorm_on_single_pixels_has_a_largest_batch(small: list[str]) -> None:
    words = ["model.name=cnn", "model.args.widths=[8,16]", "train.ema=0.9"]
    found = find_batch_size(load([], [*small, *words]))
    assert (found.size, found.reason) == (90, "the whole training set")
    assert [each.size for each in found.tried] == [2, 4, 8, 16, 32, 64, 90]


def test_memory_of_control_groups_is_that_of_the_narrowest(tmp_path: Path) -> None:
    inner = tmp_path / "jobs" / "mine"
    inner.mkdir(parents=True)
    (tmp_path / "own").write_text("0::/jobs/mine\n")
    for folder, most in ((inner, "max"), (inner.parent, "1000")):
        (folder / "memory.max").write_text(most)
        (folder / "memory.current").write_text("600")
        (folder / "memory.stat").write_text("anon 400\ninactive_file 150\n")
    assert cgroup_left(tmp_path, tmp_path / "own") == 1000 - 600 + 150
    assert cgroup_left(tmp_path / "none", tmp_path / "own") == math.inf


@pytest.mark.long
def test_the_largest_batch_of_a_wide_model_is_told_by_what_a_sample_takes(
    cli: Callable[..., Finished], tmp_path: Path
) -> None:
    images, labels = pictures(4096)
    held = {"x_train": images, "y_train": labels, "x_test": images[:9], "y_test": labels[:9]}
    np.savez(tmp_path / "arrays.npz", **held)
    finished = cli("find-batch-size", *SMALL, "model.args.hidden=[20000]", "train.accumulate=2")
    assert finished.rc == 0, finished
    match = re.search(r"largest: (\S+) samples .*a sample takes (\S+) MB", finished.out)
    assert match, finished
    # 20,000 float32 numbers, 0.08 MB: two to four times, and up to as much again by steps of the allocator.
    assert 0.16 < float(match[2]) < 1.6, finished
    assert sorted(path.name for path in tmp_path.iterdir()) == ["arrays.npz"]


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_memory_is_estimated_as_a_real_model_and_optimizer_take_it(name: str, small: list[str]) -> None:
    config = load([], [*small, f"optim.name={name}", "train.ema=0.9", "train.steps=18"])
    found = estimate(config, processes=4, speed=10.0)
    model = mlp((1, 8, 8), 3)
    optimizer = optim.build(config, model)
    saved: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    batch = torch.rand(4, 1, 8, 8)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = nn_loss(model(batch))
    own = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    loss.backward()
    optimizer.step()
    weights = sum(4 * weight.numel() for weight in model.parameters())
    moments = [value for state in optimizer.state.values() for value in state.values()]
    state = sum(value.numel() * 4 for value in moments if isinstance(value, torch.Tensor))
    assert (found.parameters, found.trained, found.part) == (weights // 4, weights // 4, 4)
    ddp, fsdp = found.memory["DDP"], found.memory["FSDP2"]
    assert (ddp["weights"], ddp["gradients"], ddp["moving average"]) == (weights, weights, weights)
    assert ddp["optimizer"] == state
    kept = sum(storage.nbytes() for place, storage in saved.items() if place not in own)
    assert ddp["activations"] == pytest.approx(kept, rel=0.1)
    assert fsdp["weights"] == math.ceil(weights / 4)
    assert (found.steps, found.samples) == (3 * 6, 3 * 90)


def nn_loss(outputs: torch.Tensor) -> torch.Tensor:
    """Cross-entropy with some labels."""
    return torch.nn.functional.cross_entropy(outputs, torch.zeros(len(outputs), dtype=torch.int64))


def test_an_estimate_is_printed_measured_or_not_and_leaves_nothing(
    cli: Callable[..., Finished], small: list[str], tmp_path: Path
) -> None:
    finished = cli("estimate", *small, "--processes", 2, "--measure")
    assert finished.rc == 0, finished
    for wanted in (
        r"parameters +\d",
        r"steps +12 \(180 samples\)",
        "FSDP2",
        r"time +\S+ hours, if each of 2",
    ):
        assert re.search(wanted, finished.out), wanted
    assert [path.name for path in tmp_path.iterdir()] == ["arrays.npz"]
    wrong = cli("estimate", *small, "--processes", 5)
    assert (wrong.rc, wrong.err.count("\n")) == (2, 1) and "train.batch_size" in wrong.err, wrong
    given = cli("estimate", *small, "--speed", 100)
    assert "0.0005 hours" in given.out and "FSDP2" not in given.out, given


def test_a_model_too_large_for_this_machine_is_estimated(small: list[str]) -> None:
    words = ["model.args.hidden=[60000,60000]", "optim.name=AdamW"]  # 14 GB of weights, 58 with their state
    found = estimate(load([], [*small, *words]), processes=8)
    assert found.parameters > 3.6e9
    total = {name: sum(filter(None, memory.values())) for name, memory in found.memory.items()}
    assert total["DDP"] > 57e9 > 45e9 > total["FSDP2"]
    assert build(load([], small)).total_steps(load([], small)) == 12
