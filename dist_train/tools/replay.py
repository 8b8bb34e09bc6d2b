"""Replay: any step of any run, rebuilt on one CPU.

A checkpoint before the step, or else the seed, gives the weights; the step number gives all the rest. What
N ranks did with M micro-batches each, one process does with N x M, by the same random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from dist_train import checkpoint, data, models, runtime, tasks
from dist_train import state as states
from dist_train.config import Config, UserError, completed, counted, from_file, printable
from dist_train.distill import taught
from dist_train.learner import Learner
from dist_train.models import weights
from dist_train.nested import map_tensors
from dist_train.optim import rates
from dist_train.record.history import read_attempts, read_metrics, read_status
from dist_train.runtime import Runtime
from dist_train.state import State
from dist_train.tasks import wide
from dist_train.tools.pictures import write_grid
from dist_train.tree import tree_sum

COLUMNS = 8
MOST_NUMBERS = 100  # of a target that is shown
MOST_CLASSES = 4  # in a mixture that is shown by their names
REPLAYED = ("data.", "model.", "task.", "optim.", "schedule.", "train.", "eval.", "seed", "precision",
            "channels_last", "checkpoint.best", "deterministic", "threads", "on_nonfinite",
            "max_skips")  # fmt: skip


@dataclass(frozen=True)
class Seen:
    """A sample of the step as the model saw it."""

    rank: int
    sample: int
    path: str
    label: str
    loss: float
    image: torch.Tensor | None  # [C, H, W]; None where inputs are no images


@dataclass(frozen=True)
class Replayed:
    """What a step did."""

    start: str  # what it was rebuilt from
    samples: list[Seen]
    loss: float  # mean over the global batch
    gradients: dict[str, float]  # norm of the gradient of each weight, before clipping


def replay(run: Path, step: int, trust: bool = False) -> Replayed:
    """Rebuilds optimizer step `step`, counted from 1 as in metrics.jsonl, of the run in folder `run`.

    Each step is done as the attempt did it that came to it last: with its configuration, and its parts of
    the global batch.

    Args:
        trust: whether the run's files may name any object, which is imported and called.

    Raises UserError where there is no such run or step.
    """
    attempts = _attempts(run)
    start = checkpoint.newest_good(run / "checkpoints", lambda text: None, before=step)
    origin = attempts[0]["config"].get("resume", "auto")
    is_other = start is None and attempts[0]["step"] and origin != "auto"  # it began as another run's state
    if is_other:
        start = checkpoint.find(origin)
    saved = checkpoint.load(start, verified=True) if start else None
    done = saved["step"] if saved else 0
    if is_other and done != attempts[0]["step"]:
        raise UserError(
            f"{run}: it began as the state of {origin} after step {attempts[0]['step']:,}, but that is at"
            f" step {done:,} now; step {step:,} can only be rebuilt from the old one."
        )
    if step <= done:
        raise UserError(f"{run}: there is no step {step:,}; the run begins with step {done + 1:,}.")
    while True:
        number = max(n for n, attempt in enumerate(attempts) if attempt["step"] <= done or n == 0)
        done = min([step, *(later["step"] for later in attempts[number + 1 :])])
        config = _on_one_cpu(attempts[number], run, trust)
        ranks = runtime.start(config)
        try:
            with nullcontext() if trust else models.no_larger(_size(run), str(run)):
                replayed, saved = _steps(config, ranks, saved, done, attempts[number]["processes"])
        finally:
            runtime.stop(ranks.accelerator)
        if done == step:
            return replace(replayed, start=str(start or "the initial weights"))


def _attempts(run: Path) -> list[dict[str, Any]]:
    """The run's attempts, in their order. Raises UserError if there is no such run."""
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run}: there is no run with a config.yaml.")
    if attempts := read_attempts(run):
        if not all(map(_is_attempt, attempts)):
            raise UserError(f"{run}/attempts.jsonl: not the record of a run's attempts.")
        return attempts
    # Runs of older versions recorded the last attempt alone.
    processes = read_status(run).get("processes", 1)
    return [{"step": 0, "processes": int(processes), "config": completed(run / "config.yaml")}]


def _is_attempt(line: Any) -> bool:
    kinds = {"step": int, "processes": int, "config": dict}
    if not isinstance(line, dict) or not isinstance(line.get("parts", 1), int) or line.get("parts", 1) < 1:
        return False
    if not all(isinstance(line.get(key), kind) for key, kind in kinds.items()):
        return False
    return line["processes"] > 0 and isinstance(line["config"].get("resume", ""), str)


def _size(run: Path) -> int:
    """The size of the run's largest checkpoint; where there is none, what a model may take without one."""
    sizes = [path.stat().st_size for path in checkpoint.newest_first(run / "checkpoints")]
    return max(sizes, default=2**30)


def _steps(
    config: Config, ranks: Runtime, saved: dict[str, Any] | None, stop: int, world_size: int
) -> tuple[Replayed, dict[str, Any]]:
    """Goes on from `saved`, or else from the seed, to step `stop`; what that step did, and the new state."""
    sets = data.build(config)
    total = sets.total_steps(config)
    if not 1 <= stop <= total:
        raise UserError(f"{config.run_dir}: there is no step {stop:,}; the run has steps 1 to {total:,}.")
    first = weights.kept(config.run_dir) if config.model.init and not saved else None
    task = taught(config, tasks.build(config), ranks, sets)[0]
    learner = Learner(config, ranks, sets, task, weights=first)
    state = State(learner)
    if saved:
        states.check_teacher(saved, state, str(config.run_dir))
        states.fill(saved, state, str(config.run_dir))
    schedule = rates.schedule(config, total, sets.steps_per_epoch(config))
    evaluations = _evaluations(config.run_dir, state)
    feed = sets.train_feed(config, ranks, learner.step, stop, learner.parts)
    while learner.step < stop - 1:
        share = schedule(learner.step, evaluations(learner.step))
        learner.train_step(islice(feed, learner.per_rank), share)
    parts = list(islice(feed, learner.per_rank))
    done = learner.train_step(parts, schedule(learner.step, evaluations(learner.step)), with_norm=True)
    state.history = evaluations(learner.step)
    trained = set(map(id, learner.parallel.weights))
    names = [name for name, weight in learner.model.named_parameters() if id(weight) in trained]
    norms = [float(torch.linalg.vector_norm(rows)) for rows in done.row_norms]
    gradients = dict(zip(names, norms, strict=True))
    per_rank = max(1, learner.parts // world_size)
    samples = [
        seen
        for batch, (values, weights) in zip(parts, done.losses, strict=True)
        for seen in _seen(sets, batch, _each_sample(values, weights).tolist(), batch.part.number // per_rank)
    ]
    weight, summed = tree_sum([wide(sums) for sums in done.sums])[:2].tolist()
    loss = summed / weight if weight else math.nan
    return Replayed("", samples, loss, gradients), states.to_dict(config, state, sets)


def _evaluations(run: Path, state: State) -> Callable[[int], dict[str, list[float]]]:
    """Of a step the values of all evaluations before it: those of the state, then those that are recorded."""
    first = state.step + bool(state.metrics)
    known = {name: list(values) for name, values in state.history.items()}
    later = [row for row in read_metrics(run) if row.get("kind") == "eval" and row["step"] >= first]

    def before(step: int) -> dict[str, list[float]]:
        history = {name: list(values) for name, values in known.items()}
        for row in later:
            for name in row if row["step"] <= step else ():
                if name.startswith("eval/"):
                    history.setdefault(name, []).append(math.nan if row[name] is None else row[name])
        return history

    return before


def _on_one_cpu(attempt: dict[str, Any], run: Path, trust: bool) -> Config:
    """The configuration of `attempt` for one process that cuts the global batch as its processes did."""
    config = from_file(attempt["config"], run, needed=REPLAYED, trust=trust)
    if config.task.teacher and not trust:
        raise UserError(
            f"{run}: task.teacher: its teacher would be read from where the run says that it lies,"
            f" {config.task.teacher}; if you trust the run: --trust (trust=True)."
        )
    # Older versions recorded what it follows from.
    parts = attempt.get("parts") or attempt["processes"] * config.train.accumulate
    half = "bf16" if config.precision == "bf16" else "fp32"
    return replace(
        config,
        run=replace(config.run, dir=str(run.parent), name=run.name),
        device="cpu",
        precision=half,
        compile=False,
        train=replace(config.train, accumulate=1, parts=parts),
    )


def _each_sample(values: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """The loss of each sample `[B]`; 0 where nothing of it weighs anything."""
    if weights is None:
        return values
    total = weights.reshape(len(weights), -1).sum(1)
    summed = (values * weights).reshape(len(weights), -1).sum(1)
    return torch.where(total > 0, summed / total, 0)


def _seen(sets: data.Data, batch: data.Batch, losses: list[float], rank: int) -> list[Seen]:
    seen = []
    for place, index in enumerate(batch.part.indices[: batch.part.size].tolist()):
        inputs = map_tensors(itemgetter(place), batch.inputs)
        is_image = sets.train.transform is not None and isinstance(inputs, torch.Tensor)
        label = _label(map_tensors(itemgetter(place), batch.targets), sets.classes)
        path = sets.known(index).get("path", "")
        seen.append(Seen(rank, index, path, label, losses[place], inputs if is_image else None))
    return seen


def _label(target: Any, classes: list[str]) -> str:
    """A target in a word: the name of a class, numbers, or nothing for what is too long."""
    if not isinstance(target, torch.Tensor):
        return ""
    if classes and target.ndim == 0:
        return classes[int(target)]
    if target.is_floating_point() and target.shape == (len(classes),):  # a class, or a mixture of them
        parts = [(share, name) for share, name in zip(target.tolist(), classes, strict=True) if share]
        if len(parts) <= MOST_CLASSES:
            return " + ".join(name if share == 1 else f"{share:.2g} {name}" for share, name in parts)
    if target.numel() > MOST_NUMBERS:
        return ""
    return str(target.tolist())


def table(replayed: Replayed) -> str:
    """The samples as lines of text, the greatest loss first, and whether the gradient is finite."""
    lines = [
        f"from {replayed.start}: loss {replayed.loss:.9g} over {counted(len(replayed.samples), 'sample')}"
    ]
    order = sorted(replayed.samples, key=lambda seen: math.inf if math.isnan(seen.loss) else seen.loss)
    for seen in reversed(order):
        place = f"rank {seen.rank}  sample {seen.sample:>8}"
        lines.append(
            f"{place}  loss {seen.loss:<12.6g} {printable(seen.label)}  {printable(seen.path)}".rstrip()
        )
    broken = [name for name, norm in replayed.gradients.items() if not math.isfinite(norm)]
    if broken:
        lines.append(f"the gradient is not finite: {', '.join(broken)}")
    else:
        norm = sum(value**2 for value in replayed.gradients.values()) ** 0.5
        lines.append(f"the gradient is finite, its norm {norm:.6g}")
    return "\n".join(lines)


def picture(replayed: Replayed, output: Path) -> None:
    """Draws the samples as the model saw them, in the order of ranks."""
    drawn = [(seen.image, f"{seen.label}\n{seen.loss:.3g}") for seen in replayed.samples]
    cells = [(image, title) for image, title in drawn if image is not None]
    if not cells:
        raise UserError("the inputs of this run are no images, so they can't be drawn.")
    write_grid([cells[first : first + COLUMNS] for first in range(0, len(cells), COLUMNS)], output)
