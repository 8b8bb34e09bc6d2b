"""Every seed and every generator: random numbers are keyed, never stored.

A seed is a function of the run's seed and of what it is for:

| for | of | by |
| --- | --- | --- |
| initial weights | seed | `seed_weights` |
| order of an epoch | seed, epoch | `generator(key(seed, "order", epoch))`, or a permutation by this key |
| samples held out for evaluation | seed | `generator(key(seed, "hold out"))` |
| augmentation of a sample | seed, epoch, index of the sample | `seed_sample`; of many: draws.py |
| dropout and other noise of the model | seed, step, part of the global batch | `seed_device` |
| what an optimizer of another package draws | seed, step | `seed_device` |
| what a sweep draws | its seed, name of the parameter, number of the run | `key` |

Nothing else seeds a generator. This file is imported without torch, as commands do that train nothing.
"""

from __future__ import annotations

import hashlib
import random
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def key(seed: int, purpose: str, *numbers: int) -> int:
    """A seed of 63 bits that is a function of its arguments, the same on every machine."""
    data = struct.pack(f"<{1 + len(numbers)}q", seed, *numbers) + purpose.encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1


def generator(seed: int) -> torch.Generator:
    """A generator of its own, on the CPU, which leaves the global ones alone."""
    import torch

    return torch.Generator().manual_seed(seed)


def seed_weights(seed: int) -> None:
    """Seeds every global generator, on all devices, for the making of a model."""
    import torch

    number = key(seed, "weights")
    _seed_python(number)
    torch.manual_seed(number)


def seed_sample(seed: int, epoch: int, index: int, everything: bool = True) -> None:
    """Seeds what a sample's transforms draw from: torch, and with `everything` also random and NumPy."""
    import torch

    number = key(seed, "augment", epoch, index)
    torch.default_generator.manual_seed(number)
    if everything:  # these two cost ten times what torch's costs
        _seed_python(number)


def seed_device(device: torch.device, seed: int) -> None:
    """Seeds torch's generators of the CPU and of `device`, without torch.manual_seed's 0.1 ms."""
    import torch

    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def _seed_python(number: int) -> None:
    import numpy as np

    random.seed(number)
    np.random.seed(number % 2**32)
