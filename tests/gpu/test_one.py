"""Each guarantee on one GPU."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from dist_train import load
from dist_train.checkpoint.snapshot import to_cpu
from dist_train.data import Batch, Feed
from dist_train.data.augment import Augment, CutMix, MixUp
from dist_train.data.order import Part
from dist_train.record.history import read_metrics, read_status
from dist_train.tools.find_batch_size import find_batch_size
from dist_train.tools.replay import replay
from tests.distributed.ranks import equal, last, same_bits
from tests.gpu.conftest import DEVICE
from tests.processes import Finished
from tests.worlds import SMALL, pictures

KINDS = {
    "fp32": [],
    "tf32": ["precision=tf32"],
    "bf16": ["precision=bf16", "channels_last=true"],
    "fp16": ["precision=fp16"],
    "compiled": ["compile=true"],
    "fsdp": ["parallel.name=fsdp"],
    "mixed": [
        "data.train_transform=[mine:dies,{ColorJitter: {contrast: 0.3}},RandomErasing,MixUp,CutMix]",
        "channels_last=true",
    ],
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_ends_with_the_bits_of_an_undisturbed_one(
    kind: str, job: list[str], cli: Callable[..., Finished], tmp_path: Path
) -> None:
    words = ["train", *job, *KINDS[kind]]
    undisturbed = cli(*words, "run.name=undisturbed", timeout=300)
    assert undisturbed.rc == 0, undisturbed
    for dies_at in (16 * 8 + 3, 16 * 9 + 3):  # in two attempts, each after some more steps
        killed = cli(*words, "run.name=killed", timeout=300, env={"DIES_AT": dies_at})
        assert killed.rc == -9, killed
    ended = cli(*words, "run.name=killed", timeout=300)
    assert ended.rc == 0, ended
    assert read_status(tmp_path / "runs/killed")["attempts"] == 3
    one, other = last(tmp_path, "undisturbed"), last(tmp_path, "killed")
    assert same_bits(one, other) and equal(one["scaler"], other["scaler"])
    assert one["metrics"]["eval/accuracy"] > 0.5


def test_a_signal_saves_and_the_run_goes_on(
    job: list[str], cli: Callable[..., Finished], tmp_path: Path
) -> None:
    words = ["train", *job, "checkpoint.every=never"]
    assert cli(*words, "run.name=undisturbed").rc == 0
    stopped = cli(*words, "run.name=stopped", env={"DIES_AT": 16 * 10, "DIES_OF": "SIGUSR1"})
    assert stopped.rc == 75, stopped
    assert cli(*words, "run.name=stopped").rc == 0
    assert same_bits(last(tmp_path, "undisturbed"), last(tmp_path, "stopped"))


def test_saves_behind_the_loops_back_hold_the_state_of_their_step(
    job: list[str], here: Callable[..., Any], tmp_path: Path
) -> None:
    """The copy goes through page-locked memory while the loop goes on changing the weights."""
    large = [*job, "model.name=mlp", "model.args.hidden=[512,512]"]
    every = [*large, "checkpoint.every=1", "checkpoint.keep=99"]
    here(*every, "run.name=all")
    for step in (3, 11):
        here(*large, f"run.name={step}", f"train.steps={step}", "checkpoint.every=never")
        saved = torch.load(tmp_path / f"runs/all/checkpoints/step-{step:08d}.pt", weights_only=True)
        alone = last(tmp_path, str(step))
        assert all(equal(saved[part], alone[part]) for part in ("model", "average", "optimizer"))


def test_the_copy_of_a_state_lies_in_page_locked_memory_which_is_used_again() -> None:
    state = {"weight": torch.arange(9.0, device=DEVICE), "step": torch.tensor(3), "name": "x"}
    first = to_cpu(state)
    assert first["weight"].is_pinned() == (DEVICE == "cuda") and not first["step"].is_cuda
    state["weight"] += 1
    assert to_cpu(state, first)["weight"] is first["weight"]
    assert torch.equal(first["weight"], torch.arange(1.0, 10))


@pytest.mark.parametrize("kind", ["fp32", "bf16", "fsdp"])
def test_the_number_of_micro_batches_does_not_change_the_bits_of_a_run_of_parts(
    kind: str, job: list[str], here: Callable[..., Any], tmp_path: Path
) -> None:
    """Four parts: taken as they are, and as what four accumulated micro-batches are."""
    words = [*job, *KINDS[kind]]
    here(*words, "run.name=parts", "train.parts=4")
    here(*words, "run.name=accumulated", "train.accumulate=4")
    assert same_bits(last(tmp_path, "parts"), last(tmp_path, "accumulated"))


def test_one_process_under_fsdp_has_the_bits_of_one_without(
    job: list[str], here: Callable[..., Any], tmp_path: Path
) -> None:
    here(*job, "run.name=plain", "train.parts=2")
    here(*job, "run.name=sharded", "train.parts=2", "parallel.name=fsdp")
    assert same_bits(last(tmp_path, "plain"), last(tmp_path, "sharded"))


def test_any_step_is_rebuilt_on_the_cpu(
    job: list[str], here: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without dropout: the noise of a GPU is not the CPU's."""
    here(*job, "model.name=mlp", "log.every=1")
    rows = {row["step"]: row for row in read_metrics(tmp_path / "runs/run") if "train/loss" in row}
    monkeypatch.chdir(tmp_path)
    for step in (4, 17):
        assert replay(Path("runs/run"), step, True).loss == pytest.approx(rows[step]["train/loss"], rel=1e-3)


def test_eval_gives_what_the_training_measured(
    job: list[str], cli: Callable[..., Finished], tmp_path: Path
) -> None:
    assert cli("train", *job).rc == 0
    best = torch.load(tmp_path / "runs/run/checkpoints/best.pt", weights_only=True)["metrics"]
    evaluated = cli("eval", "runs/run", "--trust")
    assert evaluated.rc == 0, evaluated
    assert f"eval/accuracy {best['eval/accuracy']:.6g}" in evaluated.out


def test_a_checkpoint_of_a_gpu_is_read_without_one(job: list[str], cli: Callable[..., Finished]) -> None:
    assert cli("train", *job, "train.steps=10").rc == 0
    without = cli("train", *job, "device=cpu", env={"CUDA_VISIBLE_DEVICES": ""})
    assert without.rc == 0, without
    assert "(step 10)" in without.err


def test_batches_that_are_copied_ahead_are_right_and_two_lie_there() -> None:
    """Each is used late, by a device that is busy, while the loop is far ahead of it."""
    pin = DEVICE == "cuda"
    inputs = [torch.full((2**20,), float(number)) for number in range(40)]
    part = Part(0, 0, np.arange(1), 1, 1)
    batches = (Batch(values.pin_memory() if pin else values, None, part) for values in inputs)
    feed = Feed(batches, torch.device(DEVICE))
    large, sums = torch.ones(2048, 2048, device=DEVICE), []
    if pin:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    for batch in feed:
        for _ in range(8 if pin else 0):
            large = large @ large / 2048
        sums.append(batch.inputs.double().mean())
        del batch
    assert torch.stack(sums).tolist() == list(range(40))
    loop, device = feed.waited()
    assert loop > 0 and device >= 0 and feed.waited() == (0, 0)
    if pin:
        doubles, products = 2**23, 2 * large.numel() * 4
        assert torch.cuda.max_memory_allocated() - before < 2 * 2**22 + doubles + products + 2**21


def test_augmentation_gives_the_pixels_of_a_cpu_and_nothing_waits_for_the_device() -> None:
    steps = [("ColorJitter", v2.ColorJitter(0.4, 0.4, 0.4)), ("RandomErasing", v2.RandomErasing(0.5)),
             ("MixUp", MixUp(0.4)), ("CutMix", CutMix())]  # fmt: skip
    augment = Augment(steps, 0, 10)
    batches = []
    for number in range(4):
        indices = np.arange(9) + 9 * number
        part = Part(number, 1, indices, 9, 9)
        batches.append(Batch(torch.rand(9, 3, 32, 32), torch.from_numpy(indices % 10), part))
    expected = [augment(batch) for batch in batches]
    pinned = batches
    if DEVICE == "cuda":
        pinned = [b._replace(inputs=b.inputs.pin_memory(), targets=b.targets.pin_memory()) for b in batches]
        torch.cuda.set_sync_debug_mode("error")
    try:
        seen = list(islice(Feed(iter(pinned), torch.device(DEVICE), True, augment), 4))
    finally:
        if DEVICE == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    for one, other in zip(seen, expected, strict=True):
        assert torch.allclose(one.inputs.cpu(), other.inputs, atol=1e-5)
        assert torch.allclose(one.targets.cpu(), other.targets, atol=1e-6)


@pytest.mark.skipif(DEVICE != "cuda", reason="a CPU's memory is not filled")
def test_the_largest_batch_that_fits_is_found_by_trying(tmp_path: Path) -> None:
    images, labels = pictures(4096)
    held = {"x_train": images, "y_train": labels, "x_test": images[:9], "y_test": labels[:9]}
    np.savez(tmp_path / "many.npz", **held)
    words = [*SMALL, f"data.root={tmp_path}/many.npz", "device=cuda", "model.args.hidden=[100000]"]
    torch.cuda.set_per_process_memory_fraction(2e9 / torch.cuda.get_device_properties(0).total_memory)
    try:
        found = find_batch_size(load([], words))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "did not fit" in found.reason
    assert 64 < found.size < 4096
    assert all(each.gb < 2 for each in found.tried)
