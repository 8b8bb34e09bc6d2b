"""What all sides train: the same models, data sets, losses and optimizers, and a clock in the model.

The clock is a hook of the model's forward pass, which all frameworks call once a step, so that nothing of a
framework has to be known or changed to measure it. After each turn it stops its process, and with it what
reads data for it, until the benchmark lets it go on: so sides take turns of a second or so.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

JOB = os.environ.get("JOB", "mlp")
FOLDER = Path(os.environ.get("FOLDER", "."))  # with `photos`, and `text.txt`
TURNS = {"mlp": 30, "resnet": 12, "jpeg": 6, "gpt": 12}
TURN = {"mlp": 25, "resnet": 4, "jpeg": 4, "gpt": 4}[JOB]  # steps, and one before them that isn't counted
STEPS = TURNS[JOB] * (TURN + 1) + 2
BATCH = {"mlp": 64, "resnet": 32, "jpeg": 32, "gpt": 16}[JOB]  # over all processes
RANK, RANKS = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
CONTEXT, CROP = 128, 64
LR = 1e-3
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


class Tensors(Dataset):
    """Inputs and targets in memory; a whole batch is one indexing, for whoever asks for it so."""

    classes = tuple("0123456789")
    in_threads = True  # as dist_train is told: it draws nothing, so may be read beside a step

    def __init__(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.inputs[index], self.targets[index]

    def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.read_many(torch.tensor(indices))

    def read_many(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The samples `index` `[B]` at once, as dist_train asks for them."""
        return self.inputs[index], self.targets[index]


def dataset() -> Any:
    """The training samples."""
    draw = torch.Generator().manual_seed(0)
    count = STEPS * BATCH
    if JOB == "jpeg":
        from torchvision import datasets, transforms

        steps = [transforms.RandomResizedCrop(CROP), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
        recipe = transforms.Compose([*steps, transforms.Normalize(MEAN, STD)])
        return datasets.ImageFolder(FOLDER / "photos/train", recipe)
    if JOB == "gpt":
        text = torch.frombuffer(bytearray((FOLDER / "text.txt").read_bytes()), dtype=torch.uint8).long()
        windows = text[: count * CONTEXT + 1]
        return Tensors(windows[:-1].view(count, CONTEXT), windows[1:].view(count, CONTEXT))
    shape = (1, 28, 28) if JOB == "mlp" else (3, 32, 32)
    return Tensors(torch.rand(count, *shape, generator=draw), torch.randint(0, 10, (count,), generator=draw))


def collate(samples: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch, of whatever the data set has given."""
    if isinstance(samples, tuple):  # of `Tensors`: it is one already
        return samples
    batch: tuple[torch.Tensor, torch.Tensor] = torch.utils.data.default_collate(samples)
    return batch


def loader_options() -> dict[str, Any]:
    """What a DataLoader of this job is given beside data set and sampler, for one rank."""
    return {"batch_size": BATCH // RANKS, "collate_fn": collate, "num_workers": 2 // RANKS * (JOB == "jpeg")}


def model() -> nn.Module:
    """The network, with the clock in it."""
    torch.manual_seed(0)
    if JOB == "mlp":
        layers = [nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)]
        network: nn.Module = nn.Sequential(nn.Flatten(), *layers)
    elif JOB == "gpt":
        from dist_train.models.gpt import GPT

        network = GPT(256, (CONTEXT,), depth=3, heads=4, width=128)
    else:
        from torchvision.models import resnet18

        network = resnet18(num_classes=10)
    network.register_forward_pre_hook(_clock)
    return network


def loss(scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The mean loss of scores `[B, K]`, or `[B, T, K]` of a text."""
    if scores.ndim == 3:
        scores, targets = scores.flatten(0, 1), targets.flatten()
    return nn.functional.cross_entropy(scores, targets)


def optimizer(parameters: Any) -> torch.optim.Optimizer:
    """Plain SGD."""
    return torch.optim.SGD(parameters, lr=LR)


_calls = 0
_began = 0.0
_result: dict[str, Any] = {"pid": os.getpid(), "first": 0.0, "steps": [], "memory": 0.0}


def _clock(module: nn.Module, inputs: Any) -> None:
    """Seconds until the second step begins, then seconds a step of each turn, and the most memory, in MB."""
    global _calls, _began
    if not module.training or "RESULT" not in os.environ:
        return
    now = time.time()
    place = (_calls - 1) % (TURN + 1)  # within a turn, whose first step finds the caches of another side
    _calls += 1
    if _calls == 1:
        return
    if _calls == 2:
        _result["first"] = now - float(os.environ["BEGIN"])
    elif place == 0:
        _result["steps"].append((now - _began) / TURN)
    if place == 0:
        _result["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        written = Path(f"{os.environ['RESULT']}.{RANK}")
        Path(f"{written}.new").write_text(json.dumps(_result))
        Path(f"{written}.new").replace(written)
        os.killpg(0, signal.SIGSTOP)
    elif place == 1:
        _began = now
