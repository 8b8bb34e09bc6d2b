"""`dist-train verify` tells jobs that survive a kill from those that only look as if they did."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_train import load
from dist_train.tools.verify import _culprit, _flat, _unequal
from tests.processes import Finished
from tests.worlds import SMALL

OWN = """
import random, time
generator = random.Random()  # not keyed: another in every process

def shift(image):
    time.sleep(0.001)
    return image.roll(generator.randrange(8), -1)

def keyed(image):
    time.sleep(0.001)
    return image.roll(random.randrange(8), -1)
"""
WORDS = [*SMALL, "model.args.dropout=0.3", "--steps=12", "--kills=2"]


@pytest.mark.nightly
def test_a_job_whose_random_numbers_are_keyed_passes_on_several_processes(
    cli: Callable[..., Finished], npz: Path, tmp_path: Path
) -> None:
    """In short: the next one, with random numbers of dropout alone."""
    (tmp_path / "mine.py").write_text(OWN)
    words = [*WORDS, "data.train_transform=[mine:keyed]", "train.ema=0.9"]
    result = cli("verify", *words, "--processes=2", timeout=240)
    assert result.rc == 0, result
    assert result.out.count("killed after step") == 2
    assert "identical bit for bit" in result.out
    assert not (tmp_path / "runs").exists()


@pytest.mark.long
@pytest.mark.parametrize("processes", ["1,2", pytest.param("1,2,4", marks=pytest.mark.nightly)])
def test_a_job_is_the_same_on_one_two_and_four_processes_and_killed_between_them(
    processes: str, cli: Callable[..., Finished], npz: Path, tmp_path: Path
) -> None:
    """In short only on one and two."""
    job = ["model.name=cnn", "model.args={widths: [4, 8], dropout: 0.2}", "precision=bf16", "train.ema=0.9"]
    result = cli("verify", *WORDS, *job, "model.args.dropout=0.2", f"--processes={processes}", timeout=400)
    assert result.rc == 0, result
    assert "killed after step" in result.out and "on 2 processes" in result.out
    assert "identical bit for bit" in result.out


@pytest.mark.long
def test_processes_whose_bits_must_differ_are_refused(cli: Callable[..., Finished], npz: Path) -> None:
    result = cli("verify", *WORDS, "train.batch_size=18", "--processes=1,2,3")
    assert result.rc == 2 and "2 processes can't hold whole subtrees of 6 parts" in result.err, result
    result = cli("verify", *WORDS, "--processes=1,x")
    assert result.rc == 2 and "as 1,2,4, not '1,x'" in result.err, result


@pytest.mark.long
def test_a_transform_with_random_numbers_of_its_own_is_named(
    cli: Callable[..., Finished], npz: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    transforms = "data.train_transform=[RandomHorizontalFlip,mine:shift]"
    result = cli("verify", *WORDS, transforms, "--kills=1", timeout=240)
    assert result.rc == 1, result
    assert "inputs: differ from step 1 on: data.train_transform[1], 'mine:shift', draws random" in result.err
    assert "weights: differ from step 1 on" in result.err
    assert "the order of samples" not in result.err


MASKS = """
import random, torch
from torchvision.tv_tensors import Mask
generator = random.Random(0)  # not keyed

def flips(pair):
    image, mask = pair
    return (image.flip(-1), Mask(mask.flip(-1))) if generator.random() < 0.5 else pair

class Squares(list):
    classes = ["dark", "bright"]

def squares(train):
    images = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return Squares((image, Mask((image[0] > 0.5).long())) for image in images)

class Noisy(list):
    def __getitem__(self, index):
        return {"image": torch.zeros(1, 8, 8), "size": generator.random()}

def noisy(train):
    return Noisy(range(20))
"""


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (
            ["data.name=mine:squares", "data.train_transform=[mine:flips]"],
            "data.train_transform.0., 'mine:flips'",
        ),
        (["data.name=mine:noisy"], "the data set 'mine:noisy' itself draws random numbers"),
        (["data.name=mine:squares", "data.train_transform=[RandomHorizontalFlip]"], "none of the transforms"),
    ],
)
def test_what_draws_numbers_of_its_own_is_named_for_masks_and_dicts_too(
    words: list[str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(MASKS)
    monkeypatch.syspath_prepend(tmp_path)
    assert re.match(named, _culprit(load([], ["train.epochs=1", "task.name=mine:Task", *words])))


@pytest.mark.parametrize("part", ["model", "average", "optimizer"])
def test_one_bit_that_differs_is_named(part: str) -> None:
    parts: dict[str, Any] = {name: {"weight": torch.zeros(2)} for name in ("model", "average")}
    parts |= {"optimizer": {"state": {0: {"step": torch.zeros(2)}}}, "scaler": None, "metrics": {}}
    other = copy.deepcopy(parts)
    assert not _unequal(parts, other)
    name, tensor = next(_flat(other[part], part))
    tensor[1] = 1e-45
    assert _unequal(parts, other) == [name]


@pytest.mark.long
def test_a_job_that_fails_by_itself_is_told_as_such(cli: Callable[..., Finished], tmp_path: Path) -> None:
    result = cli("verify", *SMALL, "data.root=nowhere.npz")
    assert result.rc == 2, result
    assert "nowhere.npz" in result.err and "Traceback" not in result.err


@pytest.mark.long
def test_what_a_job_of_ones_own_died_of_is_shown(
    cli: Callable[..., Finished], npz: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text("def breaks(image):\n    raise ArithmeticError('too much')\n")
    result = cli("verify", *SMALL, "data.train_transform=[mine:breaks]")
    assert result.rc == 2, result
    assert "the job fails by itself" in result.err and "ArithmeticError: too much" in result.err
