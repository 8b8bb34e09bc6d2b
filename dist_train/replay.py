"""Replay: any step of any run, rebuilt on one CPU.

A checkpoint before the step, or else the seed, gives the weights; the step number gives all the rest. What
N ranks did with M micro-batches each, one process does with N x M, by the same random numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dist_train import checkpoint, data, optim, runtime
from dist_train import state as states
from dist_train import task as tasks
from dist_train.config import Config, UserError, load
from dist_train.data.order import Part
from dist_train.keys import key
from dist_train.loop import steps
from dist_train.meters import Clock
from dist_train.report.pictures import write_grid
from dist_train.tracking import SECONDS, read_status

COLUMNS = 8


@dataclass(frozen=True)
class Seen:
    """A sample of the step as the model saw it."""

    rank: int
    sample: int
    path: str
    label: str
    loss: float
    image: torch.Tensor  # [C, H, W]


@dataclass(frozen=True)
class Replayed:
    """What a step did."""

    start: str  # what it was rebuilt from
    samples: list[Seen]
    loss: float  # mean over the global batch
    gradients: dict[str, float]  # norm of the gradient of each weight, before clipping


def replay(run: Path, step: int) -> Replayed:
    """Rebuilds optimizer step `step`, counted from 1 as in metrics.jsonl, of the run in folder `run`.

    Raises UserError where there is no such run or step.
    """
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run}: there is no run with a config.yaml.")
    world_size = int(read_status(run).get("processes", 1))
    config = _on_one_cpu(load([run / "config.yaml"]), run, world_size)
    ranks = runtime.start(config)
    try:
        sets = data.build(config)
        total = config.train.steps or (config.train.epochs or 0) * sets.steps_per_epoch(config)
        if not 1 <= step <= total:
            raise UserError(f"{run}: there is no step {step:,}; the run has steps 1 to {total:,}.")
        state, task = states.build(config, ranks, sets), tasks.build(config)
        start = _checkpoint_before(run, step)
        if start:
            states.restore(config, start, state, ranks, allow_changes=True)
        schedule = optim.schedule(config, total, sets.steps_per_epoch(config))
        batches = sets.train_batches(config, ranks, state.step, step)
        clock = Clock(config.train.batch_size, dict.fromkeys(SECONDS, 0.0))
        for _ in steps(config, ranks, state, task, schedule, batches, step - 1, clock):
            pass
        state.model.train()
        samples: list[Seen] = []
        for part in range(config.train.accumulate):
            batch = next(batches)
            runtime.seed_device(ranks.device, key(config.seed, "noise", step - 1, part))
            with ranks.accelerator.autocast():
                losses = task.loss(state.model(batch.inputs), batch.targets)
            (losses.sum() * (1 / batch.part.total if batch.part.size else 0.0)).backward()
            rank = part // (config.train.accumulate // world_size)
            samples += _seen(sets, batch, batch.part, losses.tolist(), rank)
        gradients = {
            name: float(weight.grad.norm())
            for name, weight in state.model.named_parameters()
            if weight.grad is not None
        }
        mean = sum(seen.loss for seen in samples) / len(samples)
        return Replayed(str(start or "the initial weights"), samples, mean, gradients)
    finally:
        runtime.stop()


def _on_one_cpu(config: Config, run: Path, world_size: int) -> Config:
    """`config` for one process that cuts the global batch as `world_size` of them did."""
    half = "bf16" if config.precision == "bf16" else "fp32"
    return replace(
        config,
        run=replace(config.run, dir=str(run.parent), name=run.name),
        device="cpu",
        precision=half,
        compile=False,
        train=replace(config.train, accumulate=config.train.accumulate * world_size),
    )


def _checkpoint_before(run: Path, step: int) -> Path | None:
    """The newest good checkpoint of the moment before `step`, or of an earlier one."""
    for path in checkpoint.newest_first(run / "checkpoints"):
        if checkpoint.step_of(path) < step:
            try:
                checkpoint.verify(path)
                return path
            except checkpoint.Damaged:
                continue
    return None


def _seen(sets: data.Data, batch: data.Batch, part: Part, losses: list[float], rank: int) -> list[Seen]:
    seen = []
    for place, index in enumerate(part.indices[: part.size].tolist()):
        target = batch.targets[place]
        label = str(target.tolist())
        if sets.classes and target.ndim == 0:
            label = sets.classes[int(target)]
        path = sets.told(index).get("path", "")
        seen.append(Seen(rank, index, path, label, losses[place], batch.inputs[place]))
    return seen


def table(replayed: Replayed) -> str:
    """The samples as lines of text, the greatest loss first, and whether the gradient is finite."""
    lines = [f"from {replayed.start}: loss {replayed.loss:.9g} over {len(replayed.samples)} samples"]
    order = sorted(replayed.samples, key=lambda seen: math.inf if math.isnan(seen.loss) else seen.loss)
    for seen in reversed(order):
        place = f"rank {seen.rank}  sample {seen.sample:>8}"
        lines.append(f"{place}  loss {seen.loss:<12.6g} {seen.label}  {seen.path}".rstrip())
    broken = [name for name, norm in replayed.gradients.items() if not math.isfinite(norm)]
    if broken:
        lines.append(f"the gradient is not finite: {', '.join(broken)}")
    else:
        norm = sum(value**2 for value in replayed.gradients.values()) ** 0.5
        lines.append(f"the gradient is finite, its norm {norm:.6g}")
    return "\n".join(lines)


def picture(replayed: Replayed, output: Path) -> None:
    """Draws the samples as the model saw them, in the order of ranks."""
    cells = [(seen.image, f"{seen.label}\n{seen.loss:.3g}") for seen in replayed.samples]
    write_grid([cells[first : first + COLUMNS] for first in range(0, len(cells), COLUMNS)], output)
