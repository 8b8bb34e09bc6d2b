"""A step of a run is done again: the state before it, its batches, and what is looked at meanwhile.

A checkpoint before the step, or else the seed, gives the weights; the step number gives all the rest. What
N ranks did with M micro-batches each, one process does with N x M, by the same random numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import Any

from dist_train import checkpoint, data, models, runtime, tasks
from dist_train import state as states
from dist_train.config import Config, UserError, completed, counted, from_file, nearest
from dist_train.data import Batch
from dist_train.distill import taught
from dist_train.learner import Learner, Step
from dist_train.models import weights
from dist_train.optim import rates
from dist_train.record.history import read_attempts, read_metrics, read_status
from dist_train.runtime import Runtime
from dist_train.state import State
from dist_train.tools.replay import step as steps
from dist_train.tools.replay.step import Replayed
from dist_train.tools.trace import Trace

REPLAYED = ("data.", "model.", "task.", "optim.", "schedule.", "train.", "eval.", "seed", "precision",
            "channels_last", "checkpoint.best", "deterministic", "threads", "on_nonfinite",
            "max_skips")  # fmt: skip


@dataclass(frozen=True)
class Look:
    """What to look at in a step, besides its samples."""

    layers: tuple[str, ...] = ()  # patterns of names of modules
    until: bool = False  # whether to stop before it, in a debugger


def replay(run: Path, step: int, trust: bool = False, look: Look | None = None) -> Replayed:
    """Rebuilds optimizer step `step`, counted from 1 as in metrics.jsonl, of the run in folder `run`.

    Each step is done as the attempt did it that came to it last: with its configuration, and its parts of
    the global batch.

    Args:
        trust: whether the run's files may name any object, which is imported and called.
        look: what to look at besides.

    Raises UserError where there is no such run or step, and where `look` names no module of the model.
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
                wanted = look if look and done == step else Look()
                processes = attempts[number]["processes"]
                replayed, saved = _steps(config, ranks, saved, done, processes, wanted)
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
    config: Config,
    ranks: Runtime,
    saved: dict[str, Any] | None,
    stop: int,
    world_size: int,
    look: Look,
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
    batches = list(islice(feed, learner.per_rank))
    share = schedule(learner.step, evaluations(learner.step))
    before = steps.weight_norms(learner.model)
    done, trace = _last(learner, batches, share, look)
    state.history = evaluations(learner.step)
    per_rank = max(1, learner.parts // world_size)
    replayed = steps.replayed(sets, learner, batches, done, trace, per_rank)
    layers = steps.layers(learner.model, replayed.gradients, before)
    return replace(replayed, layers=layers), states.to_dict(config, state, sets)


def _last(learner: Learner, batches: list[Batch], share: float, look: Look) -> tuple[Step, Trace]:
    """The step itself, and what its modules did."""
    model, batch = learner.model, batches[0]
    names = [name for name, _ in model.named_modules()]
    for pattern in look.layers:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(
                f"--layer: no part of the model is named like '{pattern}'{nearest(pattern, names)}."
            )
    trace = Trace(learner, lambda call: any(fnmatchcase(call.name, pattern) for pattern in look.layers))
    if look.until:
        size = f"{counted(batch.part.size, 'sample')} of part {batch.part.number}"
        print(
            f"before step {learner.step + 1:,}: here are model, learner, batches, share, and batch, {size};"
        )
        print("n takes the step, s goes into it, c goes on to the end, q leaves")
        breakpoint()
    done = learner.train_step(trace.parts(batches), share, with_norm=True)
    return done, trace


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
