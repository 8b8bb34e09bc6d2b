"""All that changes in a run, how it becomes a checkpoint, and how a run goes on from one."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dist_train import checkpoint, models, optim, tasks
from dist_train.config import Config, UserError, changes, completed, to_mapping
from dist_train.data import Data, first_batch
from dist_train.keys import key
from dist_train.meters import Best
from dist_train.progress import counted
from dist_train.runtime import Runtime
from dist_train.tasks import Task


@dataclass
class State:
    """The state of a run: its step and its tensors."""

    model: nn.Module  # not wrapped by DDP
    trained: nn.Module  # what a step calls: `model`, from `spread` on in DDP where there are several ranks
    optimizer: torch.optim.Optimizer
    average: nn.Module | None = None  # moving average of the weights
    step: int = 0  # optimizer steps done
    best: float | None = None  # best value of the metric that chooses the best checkpoint
    best_step: int | None = None  # of that checkpoint; None also in files of older versions
    best_by: str = ""  # which metric that is, as "max eval/accuracy"; empty: the task's own
    metrics: dict[str, float] = field(default_factory=dict)  # of an evaluation at this very step
    losses: list[float] = field(default_factory=list)  # of the steps since the last row of metrics
    skipped: int = 0  # steps whose update was dropped because it was not finite

    @property
    def evaluated(self) -> nn.Module:
        """The model that is evaluated and exported: the moving average where there is one."""
        return self.model if self.average is None else self.average


def build(
    config: Config, runtime: Runtime, data: Data, model: nn.Module | None = None, task: Task | None = None
) -> State:
    """The state at step 0, on the device. The initial weights are a function of the seed.

    Raises UserError for a model or optimizer that can't be built, or that the images don't fit; and for a
    `task` that doesn't fit to the model's outputs and the targets, or lacks the metric of the best.
    """
    number = key(config.seed, "weights")
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number)
    if model is None:
        if not data.classes and config.task.name == "classification":
            raise UserError("data: the data set has no `classes`, so the model's outputs can't be counted.")
        model = models.build(
            config.model.name, config.model.args, data.sample_shape, max(1, len(data.classes))
        )
    names = try_task(config, runtime, data, model, task) if task is not None else []
    if task is not None:
        Best.parse(config.checkpoint.best or task.best).check(names)
    model.to(runtime.device)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return State(model, model, optim.build(config, model))


def try_task(config: Config, ranks: Runtime, data: Data, model: nn.Module, task: Task) -> list[str]:
    """The names of what the task reports, which is tried on samples of both sets, without a trace."""
    names: list[str] = []
    parts = {"training": (data.train, data.train_shape), "evaluation": (data.eval, data.sample_shape)}
    for part, (samples, shape) in parts.items():
        batch, outputs = first_batch(samples), None
        if isinstance(task, tasks.SampleTask):
            outputs = models.probe(model, shape, config.model.name).to(ranks.device)
            batch = batch.to(ranks.device)  # where the model will be, which a task of one's own may rely on
        names = tasks.check(task, model, batch, outputs, len(data.classes))
        if outputs is not None and tasks.is_classification(task) and not data.classes:
            samples.classes = outputs.shape[1]  # as many as the model has outputs
            samples.check_labels(part)
    return names


def spread(config: Config, state: State, ranks: Runtime) -> None:
    """Wraps the model for all ranks, which must all come here: rank 0's weights, autocast, the sum of
    gradients; and makes the moving average, which is evaluated in the same arithmetic.
    """
    average = copy.deepcopy(state.model).requires_grad_(False) if config.train.ema else None
    state.trained = ranks.accelerator.prepare_model(state.model)
    ranks.sum_gradients_in_order(state.trained)
    if average is not None:
        average.load_state_dict(state.model.state_dict())  # rank 0's
        state.average = ranks.accelerator.prepare_model(average, evaluation_mode=True)
    if config.compile:
        state.model.compile()


def to_dict(config: Config, state: State, data: Data, ranks: Runtime) -> dict[str, Any]:
    """What a checkpoint holds: everything that a run, an evaluation or a prediction starts from."""
    scaler = ranks.accelerator.scaler
    return {
        "format": checkpoint.FORMAT,
        "step": state.step,
        "config": to_mapping(config),
        "model": state.model.state_dict(),
        "average": state.average.state_dict() if state.average is not None else None,
        "optimizer": state.optimizer.state_dict(),
        "scaler": scaler.state_dict() if scaler else None,
        "best": state.best,
        "best_step": state.best_step,
        "best_by": state.best_by,
        "metrics": state.metrics,
        "losses": state.losses,
        "skipped": state.skipped,
        "world_size": ranks.world_size,  # of no meaning for the steps to come: for the replay of this one
        "classes": list(map(str, data.classes)),
        "sample_shape": list(data.sample_shape),
    }


def choose(config: Config, warn: Any) -> Path | None:
    """The whole checkpoint from which the run goes on, or None for a fresh start.

    Raises UserError where `resume` forbids to go on, and where no checkpoint is whole.
    """
    folder = config.run_dir / "checkpoints"
    existing = checkpoint.newest_first(folder)
    if config.resume == "never" and (existing or (config.run_dir / "metrics.jsonl").exists()):
        raise UserError(f"resume: the run {config.run_dir} exists; choose another run.name.")
    if existing:
        good = checkpoint.newest_good(folder, warn)
        if good is None:
            raise UserError(f"{folder}: all {len(existing)} checkpoints are damaged; move the folder away.")
        return good
    return None if config.resume in ("auto", "never") else checkpoint.find(config.resume, warn)


def best_so_far(
    config: Config, state: State, by: str, say: Callable[[str], None]
) -> tuple[float | None, int | None]:
    """Value and step of the best checkpoint in the run's folder by the metric `by`, or (None, None).

    It is the one that the state names. Where that is damaged, or was the best by another metric, it is the
    best of those that are there, by the evaluations in them.
    """
    best, folder = Best.parse(by), config.run_dir / "checkpoints"
    files = [path for path in checkpoint.newest_first(folder) if checkpoint.step_of(path) <= state.step]
    if not files or not best.sign:
        return None, None
    if state.best_by == by:
        if state.best is None:
            return None, None
        if state.best_step is not None:
            try:
                checkpoint.verify(folder / checkpoint.name_of(state.best_step))
                return state.best, state.best_step
            except checkpoint.Damaged as error:
                say(f"{error} The best of those that are left takes its place.")
    value = step = None
    for path in reversed(files):  # of equal ones the first is the best
        metrics = checkpoint.load(path, verified=True)["metrics"] if checkpoint.is_whole(path) else {}
        if best.metric in metrics and best.improves(metrics, value):
            value, step = metrics[best.metric], checkpoint.step_of(path)
    if state.best_by != by:
        found = f"that of step {step:,} is the best ({value:.4g})" if step is not None else "none has one"
        say(f"checkpoint.best: by {by} now, by {state.best_by} before; of the checkpoints here {found}.")
    return value, step


def restore(
    config: Config, path: Path, state: State, ranks: Runtime, allow_changes: bool = False
) -> list[str]:
    """Fills `state` from a checkpoint; returns notes for the user.

    Raises UserError if the configuration differs in a way that would make it another training, unless
    that is allowed.
    """
    saved = checkpoint.load(path, verified=True)
    own = path.parent.resolve() == (config.run_dir / "checkpoints").resolve()
    before = completed(saved["config"])  # with the keys that are new since then
    differences = list(changes(before, to_mapping(config)))
    refused = "; ".join(str(change) for change in differences if not change.is_allowed)
    if refused and own and not allow_changes:
        raise UserError(
            f"{config.run_dir}: the run was started with another configuration ({refused});"
            " choose another run.name, put the values back, or allow it by --allow-changes."
        )
    fill(config, saved, state, ranks, str(path))
    noted = [change for change in differences if not change.key.startswith("run.")]
    whose = "" if own else ", the state of another run: its weights, its optimizer and its step"
    begin = f"going on from {path} (step {state.step:,}){whose}"
    notes = [begin, *(f"changed: {item}" for item in noted)]
    if own and saved.get("world_size", ranks.world_size) != ranks.world_size:
        notes.append(
            f"{counted(ranks.world_size, 'process')} now, {saved['world_size']} before: the global batch"
            f" stays {config.train.batch_size}"
        )
    return notes


def fill(config: Config, saved: dict[str, Any], state: State, ranks: Runtime, where: str) -> None:
    """Fills `state` from what `to_dict` made. Raises UserError, naming `where`, if it does not fit."""
    try:
        state.model.load_state_dict(saved["model"])
        if state.average is not None:
            state.average.load_state_dict(saved["average"] or saved["model"])
        changed = saved["config"]["optim"]["args"] != to_mapping(config)["optim"]["args"]
        _restore_optimizer(state.optimizer, saved["optimizer"], changed)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{where}: does not fit the model of this configuration: {reason}") from None
    if (scaler := ranks.accelerator.scaler) and saved["scaler"]:
        scaler.load_state_dict(saved["scaler"])
    state.step, state.best = saved["step"], saved["best"]
    state.best_step = saved.get("best_step")
    state.best_by = saved.get("best_by") or saved["config"]["checkpoint"]["best"]
    state.metrics, state.losses = saved["metrics"], saved["losses"]
    state.skipped = saved.get("skipped", 0)


def _restore_optimizer(
    optimizer: torch.optim.Optimizer, saved: dict[str, Any], changed_args: bool = False
) -> None:
    """Restores the optimizer's tensors, and the options of its groups of weights.

    Options that may lie in a group as state stay as they were saved, unless the configuration's arguments
    are others now. The rate that the schedule scales, and how steps are computed, are the configuration's.
    """
    there, before = len(optimizer.param_groups), len(saved["param_groups"])
    if there != before:
        plural = "s" if there > 1 else ""
        raise ValueError(f"the optimizer has {there} group{plural} of weights, the saved one {before}")
    ours = {"initial_lr", "fused", "foreach"}
    groups = []
    for old, new in zip(saved["param_groups"], optimizer.param_groups, strict=True):
        kept = {"params"} if changed_args else old.keys() - ours
        groups.append(new | {name: old[name] for name in kept})
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
