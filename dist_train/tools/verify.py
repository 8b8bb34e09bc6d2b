"""Proof on a user's own job: killed and gone on, and on other numbers of processes, are its bits the same?

The job is trained for a few steps, then on each other number of processes, then with SIGKILLs at random steps
and another number of processes after each; always by the command that a user would give. Then what each step
read, the losses and the weights after each step are compared, bit for bit.
"""

from __future__ import annotations

import contextlib
import copy
import math
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from dist_train import checkpoint, data
from dist_train.config import Config, RunError, UserError, counted, to_yaml
from dist_train.data.transforms import ImageTransform
from dist_train.models import pretrained
from dist_train.parts import keeps_bits, part_size, parts_per_rank
from dist_train.record.history import read_lines, read_metrics
from dist_train.seeds import seed_sample

KILL_SECONDS = 600  # how long to wait for the step at which to kill


@dataclass(frozen=True)
class Trial:
    """What a job is put to."""

    steps: int = 30  # optimizer steps of each training
    kills: int = 3
    processes: tuple[int, ...] = (1,)
    seed: int = 0  # chooses the steps at which it is killed


def verify(config: Config, folder: Path, trial: Trial, say: Callable[[str], None]) -> list[str]:
    """Trains several times in `folder`; returns what differs from the first time, one sentence each.

    Raises UserError if the job can't be trained at all, or not on so many processes with the same bits.
    """
    config = replace(
        pretrained.with_own_transforms(config),
        resume="auto",
        train=replace(config.train, epochs=None, steps=trial.steps, parts=_parts(config, trial.processes)),
        eval=replace(config.eval, every="never"),
        checkpoint=replace(config.checkpoint, every=1, keep=trial.steps + 1),
        log=replace(config.log, every=1, batches=True),
        wandb=replace(config.wandb, mode="disabled"),
    )
    first, *others = trial.processes
    say(f"training {counted(trial.steps, 'step')} on {counted(first, 'process')}, undisturbed")
    _train(config, folder / "undisturbed", first)
    found = []
    for number in others:
        say(f"training on {counted(number, 'process')}")
        _train(config, run := folder / f"on-{number}", number)
        found += [f"on {number}: {text}" for text in _differences(config, folder / "undisturbed", run)]
    killed = folder / "killed"
    steps = random.Random(trial.seed).sample(range(1, max(trial.steps - 1, trial.kills + 1)), trial.kills)
    for number, step in zip(cycle(trial.processes), sorted(steps)):
        _train(config, killed, number, step)
        say(f"killed after step {step} on {counted(number, 'process')}")
    say("going on to the end")
    _train(config, killed, trial.processes[trial.kills % len(trial.processes)])
    return found + list(_differences(config, folder / "undisturbed", killed))


def _parts(config: Config, processes: Sequence[int]) -> int:
    """Parts of a step that all these numbers of processes can share."""
    train = config.train
    parts = train.parts or math.lcm(*processes) * train.accumulate
    for number in processes:
        parts_per_rank(parts, number)
        if len(processes) > 1 and not keeps_bits(parts, number):
            raise UserError(
                f"--processes: {number} processes can't hold whole subtrees of {parts} parts, so their bits"
                " differ from those of others; use powers of two, such as 1,2,4."
            )
    part_size(train.batch_size, parts, processes[-1], train.accumulate)
    return parts


def _train(config: Config, run: Path, processes: int, kill_at: int = 0) -> None:
    """Trains in a process of its own, to the end, or to a SIGKILL once step `kill_at` is recorded."""
    config = replace(config, run=replace(config.run, dir=str(run.parent), name=run.name))
    file = run.with_suffix(".yaml")
    file.write_text(to_yaml(config), encoding="utf-8")
    # Without a restart: here the launcher itself is killed, with all that it started.
    launcher = ["launch", f"--nproc={processes}", "--max-restarts=0", "--no-spare"]
    words = ["dist_train", *(launcher if processes > 1 else ["train"]), str(file)]
    log = run.with_suffix(".txt")
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *words], stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    try:
        if kill_at:
            _wait_for(run / "metrics.jsonl", kill_at, process)
        else:
            process.wait()
        if process.returncode:
            lines = log.read_text(encoding="utf-8").splitlines()
            said = [line.removeprefix("dist-train: ") for line in lines if line.startswith("dist-train: ")]
            raise UserError(said[-1] if said else "\n".join(["the job fails by itself:", *lines[-20:]]))
    finally:
        _kill(process)


def _wait_for(metrics: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + KILL_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        rows = list(read_lines(metrics))
        if rows and rows[-1]["step"] >= step:
            return
        time.sleep(0.002)
    if process.poll() is None:
        raise RunError(f"step {step} did not come in {KILL_SECONDS} s.")


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kills a process and all that it started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        for child in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        psutil.wait_procs(family, timeout=10)
    process.wait()


def _differences(config: Config, one: Path, other: Path) -> Iterator[str]:
    """What differs between two runs, and from which step on."""
    read_one, read_other = _batches(one), _batches(other)
    for name, what in (("samples", "the order of samples"), ("inputs", "inputs"), ("targets", "targets")):
        steps = [key[0] for key in read_one if read_one[key][name] != read_other.get(key, {}).get(name)]
        if steps:
            culprit = f": {_culprit(config)}" if name == "inputs" else ""
            yield f"{what}: differ from step {min(steps)} on{culprit}"
    rows_one, rows_other = ({row["step"]: row for row in read_metrics(run)} for run in (one, other))
    for name in ("train/loss", "train/grad_norm", "lr"):
        steps = [n for n, row in rows_one.items() if row.get(name) != rows_other.get(n, {}).get(name)]
        if steps:
            yield f"{name}: differs from step {min(steps)} on"
    for path in reversed(checkpoint.newest_first(one / "checkpoints")):
        twin = other / "checkpoints" / path.name
        if not twin.exists():
            yield f"weights: the other run has no checkpoint of step {checkpoint.step_of(path)}"
            return
        if names := _unequal(checkpoint.load(path), checkpoint.load(twin)):
            yield f"weights: differ from step {checkpoint.step_of(path)} on, first in {names[0]}"
            return


def _batches(run: Path) -> dict[tuple[int, int], dict[str, Any]]:
    """What was read for each part of each step, as the last attempt did that came to it."""
    found: dict[tuple[int, int], dict[str, Any]] = {}
    files = (run / "batches").glob("attempt-*-rank-*.jsonl")
    for path in sorted(files, key=lambda path: int(path.name.split("-")[1])):
        for line in read_lines(path):
            found[line["step"], line["part"]] = line
    return found


def _unequal(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of the values of model, moving average, optimizer and loss scale that are not the same bits."""
    names = []
    for part in ("model", "average", "optimizer", "scaler", "metrics"):
        values, twins = dict(_flat(one[part], part)), dict(_flat(other[part], part))
        names += [name for name in values if not _same(values[name], twins.get(name))]
        names += [name for name in twins if name not in values]
    return names


def _flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """(full name, value) of each value in nested dicts and lists."""
    if isinstance(value, (list, tuple)):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        yield name, value
        return
    for key, item in value.items():
        yield from _flat(item, f"{name}.{key}")


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return np.array_equal(one, other)
    return bool(one == other)


def _culprit(config: Config) -> str:
    """Which part of the data path gives the same sample differently when it is asked twice."""
    samples = data.build(config).train

    for index in range(min(len(samples), 8)):
        pair = _twice(partial(samples.pair, index), config.seed, index)
        if pair is None:
            return f"the data set '{config.data.name}' itself draws random numbers of its own"
        for position, name in enumerate(data.train_transforms(config)[0]):
            pair = _twice(partial(ImageTransform([name]).geometry_of_pair, *pair), config.seed, index)
            if pair is None:
                shown = next(iter(name)) if isinstance(name, dict) else name
                key = "eval" if config.data.train_transform is None else "train"
                return (
                    f"data.{key}_transform[{position}], '{shown}', draws random numbers that are not keyed:"
                    " take them from torch, random or numpy.random, which are seeded for each sample"
                )
    return "none of the transforms alone; what they read may have changed meanwhile"


def _twice(make: Callable[[], Any], seed: int, index: int) -> Any:
    """The pair that `make` gives for a sample, or None if it gives another one when it is asked again."""
    pairs = []
    for _ in range(2):
        seed_sample(seed, 0, index)
        pairs.append(copy.deepcopy(make()))
    one, other = (dict(_flat(pair, "")) for pair in pairs)
    same = one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    return pairs[0] if same else None
