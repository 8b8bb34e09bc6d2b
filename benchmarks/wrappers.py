"""What Accelerate's wrappers cost a step: the reason why only the model is given to it.

    python benchmarks/wrappers.py     # about a minute

The quickstart's MLP, batch 64, one thread: forward, backward, step, zero_grad over batches of a DataLoader
that holds them ready. In turn bare, with the optimizer wrapped, with the DataLoader wrapped, with both; what
is reported are medians over the rounds: of the microseconds by which a step takes longer than the bare one.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from overhead import BATCH, LR, network, processor
from torch import nn
from torch.utils.data import DataLoader, Dataset

STEPS = 200  # of each side in a round
SIDES = {"bare": "", "optimizer": "o", "DataLoader": "d", "both": "od"}


class Ready(Dataset):
    """Batches that are there already."""

    def __init__(self) -> None:
        self.batch = torch.rand(BATCH, 1, 28, 28), torch.randint(10, (BATCH,))

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.batch


def steps(model: nn.Module, optimizer: Any, batches: Iterable[Any]) -> float:
    """Microseconds of a step."""
    begin = time.perf_counter()
    for inputs, targets in batches:
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    return (time.perf_counter() - begin) / STEPS * 1e6


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    model = network()
    bare = torch.optim.SGD(model.parameters(), lr=LR)
    loader = DataLoader(Ready(), batch_size=None)
    optimizers = {"": bare, "o": accelerator.prepare_optimizer(torch.optim.SGD(model.parameters(), lr=LR))}
    loaders = {"": loader, "d": accelerator.prepare_data_loader(DataLoader(Ready(), batch_size=None))}
    took: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(rounds + 1):
        for side in list(SIDES)[:: -1 if number % 2 else 1]:
            what = SIDES[side]
            seconds = steps(model, optimizers["o" * ("o" in what)], loaders["d" * ("d" in what)])
            if number:  # the first round warms up
                took[side].append(seconds)
    middle = statistics.median(took["bare"])
    print(f"bare: {middle:.0f} us a step")
    for side in list(SIDES)[1:]:
        more = statistics.median(a - b for a, b in zip(took[side], took["bare"], strict=True))
        print(f"{side}: {more:+.0f} us, {more / middle:+.1%}")
    print(f"{processor()}, load average {os.getloadavg()[0]:.1f}, torch {torch.__version__}")


if __name__ == "__main__":
    main()
