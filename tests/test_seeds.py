"""Every seed is a function of what it is for."""

from __future__ import annotations

import random
import re
import subprocess
import sys

import numpy as np
import torch

from dist_train import seeds
from tests.processes import REPO


def drawn() -> list[float]:
    """A number from each global generator of the CPU."""
    return [torch.rand(()).item(), random.random(), float(np.random.random())]


def test_a_key_is_the_same_on_every_machine_and_another_one_for_each_purpose_and_number() -> None:
    assert seeds.key(7, "order", 3) == 8855036686656772935  # of this value runs' orders are made
    others = [
        seeds.key(8, "order", 3),
        seeds.key(7, "noise", 3),
        seeds.key(7, "order", 4),
        seeds.key(7, "order"),
    ]
    assert len({seeds.key(7, "order", 3), *others}) == 5
    assert all(0 <= number < 2**63 for number in others)


def test_weights_samples_and_noise_are_seeded_anew_whatever_was_drawn_before() -> None:
    for seed in (lambda: seeds.seed_weights(3), lambda: seeds.seed_sample(3, 1, 2)):
        seed()
        first = drawn()
        drawn()
        seed()
        assert drawn() == first
    seeds.seed_device(torch.device("cpu"), seeds.key(3, "noise", 1, 0))
    first = torch.rand(4)
    seeds.seed_device(torch.device("cpu"), seeds.key(3, "noise", 1, 0))
    assert torch.equal(torch.rand(4), first)


def test_a_generator_of_its_own_leaves_the_global_ones_alone() -> None:
    seeds.seed_weights(3)
    first = drawn()
    seeds.seed_weights(3)
    torch.rand(4, generator=seeds.generator(5))
    assert drawn() == first


def test_keys_need_no_torch() -> None:
    code = "import sys, dist_train.seeds as s; s.key(1, 'x'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == 0


def test_nothing_else_seeds_a_generator() -> None:
    seeding = re.compile(r"manual_seed|random\.seed\(|torch\.Generator\(")
    files = [path for path in (REPO / "dist_train").rglob("*.py") if path.name != "seeds.py"]
    assert [path for path in files if seeding.search(path.read_text(encoding="utf-8"))] == []
