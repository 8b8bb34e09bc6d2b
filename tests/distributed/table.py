"""The table of docs/guarantees.md: jobs of many kinds, each on several numbers of processes, moved, killed.

python -m tests.distributed.table           # prints the table, in some minutes
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.distributed.ranks import ROOT, SMALL
from tests.processes import environment, finish, world
from tests.warm import Process
from tests.worlds import write_npz

STEPS = 9
COMMON = [
    *SMALL, "threads=1", "train.parts=4", "train.batch_size=16", "train.clip_norm=1", "train.ema=0.9",
    "checkpoint.every=2", "checkpoint.keep=1", "log.every=3", "eval.every=5", "eval.batch_size=5",
]  # fmt: skip
MODELS = {
    "MLP + dropout": ["model.name=mlp", "model.args={hidden: [32], dropout: 0.3}"],
    "CNN + BatchNorm": ["model.name=cnn", "model.args={widths: [8, 16], dropout: 0.2}"],
    "ResNet-18": [
        "model.name=resnet18", "data.eval_transform=[{Resize: {size: [32, 32]}}]", "checkpoint.every=4",
    ],
    "GPT": [
        "data.name=text", "data.root=text.txt", "data.args={context: 16}", "data.eval_fraction=0.2",
        "model.name=gpt", "model.args={depth: 2, heads: 2, width: 16, dropout: 0.1}", "task.name=language",
    ],
}  # fmt: skip
OPTIMIZERS = {
    "SGD": ["optim.name=SGD", "optim.lr=0.05", "optim.args={momentum: 0.9}"],
    "AdamW": ["optim.name=AdamW", "optim.lr=0.003"],
}
JOBS: dict[tuple[str, str, str], list[str]] = {
    (model, optimizer, precision): [*MODELS[model], *OPTIMIZERS[optimizer], f"precision={precision}"]
    for model in MODELS
    for optimizer in OPTIMIZERS
    for precision in ("fp32", "bf16")
}
# Many options at once: hashes are equal only if each of them keeps to what belongs to the run.
RECIPES = {
    ("MLP + dropout", "LAMB, groups, layer decay, clip_value, plateau", "fp32"): [
        *MODELS["MLP + dropout"], "optim.name=pytorch_optimizer:Lamb", "optim.lr=0.01",
        "optim.args={weight_decay: 0.05}", "optim.no_decay=[biases]", "optim.layer_decay=0.5",
        "optim.groups=[{match: '4', lr: x2}]", "train.clip_value=0.05", "schedule.name=plateau",
        "schedule.warmup=2", "schedule.args={factor: 0.5, patience: 0, by: 10}", "eval.every=2",
    ],
    ("CNN + BatchNorm", "Muon, no_decay, WSD, MixUp, stop_when", "bf16"): [
        *MODELS["CNN + BatchNorm"], "optim.name=Muon", "optim.lr=0.02", "precision=bf16",
        "optim.args={weight_decay: 0.1, rest: {AdamW: {lr: 0.003}}}", "optim.no_decay=[norms, biases]",
        "schedule.name=wsd", "schedule.warmup=2", "schedule.args={decay: 4 steps}", "train.steps=12",
        "data.train_transform=[{MixUp: {alpha: 0.4}}]", "task.args={label_smoothing: 0.1}", "eval.every=3",
        f"train.stop_when=eval/loss not better by 10 for {STEPS // 3 - 1} evaluations",
    ],
    ("CNN + BatchNorm", "BCE, RandAugment, RandomErasing, CutMix, recompute", "fp32"): [
        *MODELS["CNN + BatchNorm"], *OPTIMIZERS["SGD"], "parallel.recompute=true",
        "task.args={loss: bce, threshold: 0.2, label_smoothing: 0.1}",
        "data.train_transform=[RandAugment,{RandomErasing: {p: 0.5}},{CutMix: {alpha: 1.0}}]",
    ],
}  # fmt: skip
JOBS |= RECIPES
MOVED, KILLED = "2 → 4 → 1", "killed three times"
COLUMNS = ("1", "2", "4", MOVED, KILLED)


def train(folder: str, number: int, at: int = 0, signal_number: int = signal.SIGKILL) -> None:
    """Trains a job in this process, to its end, or if `at` is not 0 to a signal after so many steps."""
    from dist_train import fit, load
    from dist_train.learner import Learner

    plain = Learner.train_step

    def step(learner: Learner, *arguments: Any, **options: Any) -> Any:
        if at and learner.step == at:
            os.kill(os.getpid(), signal_number)
        return plain(learner, *arguments, **options)

    words = list(JOBS.values())[number]
    Learner.train_step = step  # type: ignore[method-assign]
    try:
        fit(load([], ["data.name=arrays", "data.root=arrays.npz", *COMMON, f"train.steps={STEPS}", *words,
                      f"run.dir={folder}", f"run.name=job-{number}"]))  # fmt: skip
    finally:
        Learner.train_step = plain  # type: ignore[method-assign]


def train_all(folder: str, numbers: Sequence[int], at: int = 0) -> None:
    """Trains jobs one after the other in this process, each to its end or to an interruption."""
    for number in numbers:
        train(folder, number, at, signal.SIGUSR1)


def on_ranks(count: int, cwd: Path, *command: Any) -> list[int]:
    """Exit codes of so many ranks that call a function."""
    output = cwd / "output.txt"
    variables = world(count) if count > 1 else [{}]
    started = [Process(command, cwd, environment(**own), output, output) for own in variables]
    return [finish(process, 600).rc for process in started]


def make(
    cwd: Path, numbers: Sequence[int], columns: Sequence[str] = COLUMNS
) -> Iterator[tuple[int, dict[str, str]]]:
    """(number of a job, hash of all that came out by column) of some jobs, trained in `cwd`."""
    write_npz(cwd)
    (cwd / "text.txt").write_text((ROOT / "LICENSE").read_text(), encoding="utf-8")
    for count in (1, 2, 4):
        if str(count) in columns:
            _check(on_ranks(count, cwd, train_all, str(count), numbers), cwd)
    if MOVED in columns:
        for count, at in ((2, 2), (4, 5), (1, 0)):  # each stops at a step on which ranks agree
            _check(on_ranks(count, cwd, train_all, MOVED, numbers, at), cwd)
    for number in numbers:
        if KILLED in columns:
            _kill(cwd, number)
        yield number, {column: digest(cwd / column / f"job-{number}") for column in columns}


def _kill(cwd: Path, number: int) -> None:
    for step in (3, 5, 8):
        codes = on_ranks(2, cwd, train, KILLED, number, step)
        assert codes == [-signal.SIGKILL] * 2, (cwd / "output.txt").read_text()[-3000:]
    _check(on_ranks(2, cwd, train, KILLED, number), cwd)


def _check(codes: list[int], cwd: Path) -> None:
    assert not any(codes), (cwd / "output.txt").read_text()[-3000:]


def digest(run: Path) -> str:
    """A hash of a run's last state, its bits, and of its rows but for what clocks tell."""
    from dist_train.record.history import read_metrics

    saved = torch.load(run / "checkpoints" / "last.pt", weights_only=True)
    sha = hashlib.sha256()
    for part in ("step", "model", "average", "optimizer", "metrics", "best", "best_step", "window"):
        _feed(sha, saved[part])
    clocks = ("time", "attempt")
    for row in read_metrics(run):
        kept = {k: v for k, v in row.items() if k not in clocks and not k.startswith("perf/")}
        sha.update(json.dumps(kept).encode())
    return sha.hexdigest()[:8]


def _feed(sha: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        sha.update(value.contiguous().numpy().tobytes())
    elif isinstance(value, dict):
        for key, item in value.items():
            sha.update(str(key).encode())
            _feed(sha, item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _feed(sha, item)
    else:
        sha.update(repr(value).encode())


def main() -> None:
    """Prints the table."""
    print("| model | optimizer | precision | " + " | ".join(COLUMNS) + " |")
    print("| --- " * (3 + len(COLUMNS)) + "|")
    with tempfile.TemporaryDirectory() as folder:
        for number, found in make(Path(folder), range(len(JOBS))):
            name = " | ".join(list(JOBS)[number])
            print(f"| {name} | " + " | ".join(f"`{found[column]}`" for column in COLUMNS) + " |", flush=True)
    print(f"\ntorch {torch.__version__}, one thread a process")


if __name__ == "__main__":
    sys.exit(main())
