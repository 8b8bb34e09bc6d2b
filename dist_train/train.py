"""The loop: one for one CPU, one MPS device, or many GPUs on many nodes.

The state of a run is (config, step, tensors); the order of samples, augmentation, dropout and learning
rate are functions of the step. So a run that was killed anywhere goes on exactly, from any checkpoint.
`fit` prepares what the loop needs and keeps the record; `_loop` is the loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_train import checkpoint, data, optim, runtime
from dist_train import state as states
from dist_train import task as tasks
from dist_train.config import Config, Every, UserError, from_mapping, load, to_yaml
from dist_train.evaluate import evaluate
from dist_train.interrupt import Interrupt
from dist_train.keys import key
from dist_train.meters import Best, Clock, Window
from dist_train.progress import Progress
from dist_train.runtime import Runtime, seed_device
from dist_train.state import State
from dist_train.task import Task
from dist_train.tracking import Tracker

MEET_SECONDS = 2.0  # ranks agree on interruptions and timed saves about this often, or more often


@dataclass(frozen=True)
class Result:
    """How a call of `fit` ended."""

    folder: Path
    state: str  # completed | interrupted
    step: int
    metrics: dict[str, float]  # of the last evaluation


def fit(
    config: Config | Mapping[str, Any] | str | Path,
    *,
    model: nn.Module | None = None,
    train_data: Any = None,
    eval_data: Any = None,
    task: Task | None = None,
) -> Result:
    """Trains what `config` says, or goes on with it where its run's folder holds a checkpoint.

    Args:
        config: a Config, nested dicts, or the path of a YAML file.
        model, train_data, eval_data, task: used instead of what the configuration names. Data sets are
            map-style, of (image `[C, H, W]`, target); `train_data.classes` names the classes, if any.

    Raises UserError for mistakes in the configuration or the data.
    """
    if isinstance(config, Mapping):
        config = from_mapping(config)
    elif not isinstance(config, Config):
        config = load([config])
    config = _with_names(config, model=model, data=train_data, task=task)
    with Interrupt() as interrupt:
        ranks = runtime.start(config)
        try:
            return _fit(config, ranks, interrupt, model, train_data, eval_data, task)
        finally:
            runtime.stop()


def _with_names(config: Config, **given: Any) -> Config:
    """`config` that names the classes of what `fit` was given, instead of what is then not used."""
    for section, item in given.items():
        if item is not None:
            name = f"{type(item).__module__}:{type(item).__qualname__}"
            config = replace(config, **{section: replace(getattr(config, section), name=name)})
    return config


def _fit(
    config: Config,
    ranks: Runtime,
    interrupt: Interrupt,
    model: nn.Module | None,
    train_data: Any,
    eval_data: Any,
    task: Task | None,
) -> Result:
    """Builds everything, restores the state, runs the loop, and says how it ended."""
    notes: list[str] = []
    with ranks.together():
        runtime.micro_batch(config.train.batch_size, ranks.world_size, config.train.accumulate)
        task = task or tasks.build(config)
        with ranks.main_of_node_first():
            sets = data.build(config, train_data, eval_data)
        state = states.build(config, ranks, sets, model)
        per_epoch = sets.steps_per_epoch(config)
        total = config.train.steps or (config.train.epochs or 0) * per_epoch
        schedule = optim.schedule(config, total, per_epoch)
        start = states.choose(config, notes.append) if ranks.is_main else None
    start = ranks.from_main(start)
    with ranks.together():
        if start:
            notes += states.restore(config, start, state, ranks.accelerator.scaler)
    if state.step >= total and state.metrics:
        if ranks.is_main:
            print(f"The run is complete: {config.run_dir} (step {state.step:,} of {total:,}).")
        return Result(config.run_dir, "completed", state.step, state.metrics)
    with ranks.together():
        tracker = _open_record(config, total, state.step) if ranks.is_main else None
    if tracker:
        for note in [*sets.notes, *notes, _describe(config, ranks, sets, total)]:
            tracker.say(note)
    end, reason = "failed", ""
    try:
        reason = _loop(config, ranks, interrupt, state, sets, task, tracker, schedule, total)
        end = "interrupted" if reason else "completed"
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        raise
    finally:
        if tracker:
            tracker.close(end, state.step, reason)
    return Result(config.run_dir, end, state.step, state.metrics)


def _loop(
    config: Config,
    ranks: Runtime,
    interrupt: Interrupt,
    state: State,
    sets: data.Data,
    task: Task,
    tracker: Tracker | None,  # on rank 0
    schedule: Callable[[int], float],
    total: int,
) -> str:
    """Trains from `state.step` to `total`; returns why it stopped before the end, or nothing."""
    accelerator, device = ranks.accelerator, ranks.device
    accumulate, clip_norm = config.train.accumulate, config.train.clip_norm
    per_epoch = sets.steps_per_epoch(config)
    eval_every, save_every = Every.parse(config.eval.every), Every.parse(config.checkpoint.every)
    best = Best.parse(config.checkpoint.best or task.best)
    saver = checkpoint.Checkpoints(config.run_dir, config.checkpoint.keep) if ranks.is_main else None
    model, optimizer = accelerator.prepare(state.model, state.optimizer)  # may move the weights
    if not accelerator.scaler:  # the wrapper costs 60 us a step, and only fp16's loss scale needs it
        optimizer = state.optimizer
    # Accelerate's divides the loss by its own accumulation, 1 here; only a loss scale needs it.
    backward = accelerator.backward if accelerator.scaler else torch.Tensor.backward
    model.train()
    weights = [weight for weight in state.model.parameters() if weight.requires_grad]
    average = None
    if state.average:
        average = optim.average_updater(state.average, state.model, config.train.ema)
    eval_batches = sets.eval_loader(config, ranks)
    batches = iter(sets.train_loader(config, ranks, state.step, total))
    window, clock = Window(ranks, accumulate, state.losses), Clock(config.train.batch_size)
    meet_at, saved_at = state.step + 1, time.monotonic()

    def measure() -> None:
        state.metrics = evaluate(
            state.evaluated, eval_batches, task, ranks, config.channels_last, interrupt.is_set
        )
        if tracker and state.metrics:
            tracker.log(state.step, (state.step - 1) // per_epoch, state.metrics)

    def save(is_best: bool) -> None:
        state.losses = window.losses
        if is_best:
            state.best = state.metrics[best.metric]
        if saver:
            saver.save(states.to_dict(config, state, sets, accelerator.scaler), is_best)

    if (
        state.step and not state.metrics and (state.step == total or eval_every.due(state.step, per_epoch))
    ):  # the attempt before was interrupted ahead of this evaluation
        measure()
        save(best.improves(state.metrics, state.best))

    for step in range(state.step, total):
        optim.set_lr(optimizer, lr := schedule(step))
        for micro in range(accumulate):
            asked = time.perf_counter()
            inputs, targets, part = next(batches).to(device, config.channels_last)
            clock.data_seconds += time.perf_counter() - asked
            # Keyed by the part of the global batch, not by the rank alone: 2 processes x 1 part drop
            # the same units as 1 process x 2 parts.
            seed_device(device, key(config.seed, "noise", step, ranks.rank * accumulate + micro))
            with nullcontext() if micro == accumulate - 1 else accelerator.no_sync(model):
                losses = task.loss(model(inputs), targets)
                # The mean over the global batch, however it was cut; DDP divides by the world size.
                loss = losses.sum() * (ranks.world_size / part.total if part.size else 0.0)
                backward(loss)
            window.add(loss.detach())
        if clip_norm:
            accelerator.clip_grad_norm_(weights, clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        if average:
            average(step)

        state.step, state.metrics = step + 1, {}
        clock.steps += 1
        last = state.step == total
        log_due = last or state.step % config.log.every == 0
        eval_due = last or eval_every.due(state.step, per_epoch)
        save_due = last or save_every.due(state.step, per_epoch)
        if not (log_due or eval_due or save_due or state.step >= meet_at):
            continue
        # The one wait for the device and the other ranks: losses, and with them what each rank asks.
        timed = 0 < save_every.seconds < time.monotonic() - saved_at and ranks.is_main
        stop, save_now, seconds = window.meet(interrupt.is_set(), timed, clock.seconds_per_step)
        pace = ranks.world_size * MEET_SECONDS / max(seconds, 1e-9)
        meet_at = state.step + max(1, min(config.log.every, int(pace)))
        if log_due:
            productive = clock.seconds
            row = {"train/loss": window.take(), "lr": lr, **clock.take(total - state.step)}
            if tracker:
                tracker.productive(productive)
                tracker.log(state.step, step // per_epoch, row)
        with clock.paused():
            if eval_due and not stop:
                measure()
                stop = not state.metrics  # a signal came in the middle of it: the next attempt repeats it
            is_best = best.improves(state.metrics, state.best)
            if save_due or save_now or stop or is_best:
                save(is_best)
                saved_at = time.monotonic()
            if tracker:
                tracker.status("running", state.step)
        if stop:
            break
    if saver:
        saver.wait()
    if state.step < total or not state.metrics:
        return interrupt.reason or "a signal to another rank"
    if tracker:
        names = {"classes": "\n".join(sets.classes)}
        checkpoint.save_weights(config.run_dir / "model.safetensors", state.evaluated, names)
    return ""


def _open_record(config: Config, total: int, step: int) -> Tracker:
    """Raises UserError if the run's folder can't be written."""
    text = to_yaml(config).encode()
    try:
        config.run_dir.mkdir(parents=True, exist_ok=True)
        checkpoint.write_atomically(config.run_dir / "config.yaml", lambda file: file.write(text))
        return Tracker(config, Progress(total, step), total)
    except OSError as error:
        raise UserError(f"run.dir: {config.run_dir} can't be written: {error.strerror}.") from None


def _describe(config: Config, ranks: Runtime, sets: data.Data, total: int) -> str:
    processes = f"{ranks.world_size} process{'es' if ranks.world_size > 1 else ''}"
    threads = torch.get_num_threads()
    return (
        f"run {config.run_dir}: {config.model.name} on {config.data.name},"
        f" {len(sets.train):,} training and {len(sets.eval):,} eval samples, {total:,} steps of"
        f" {config.train.batch_size}, {processes} on {ranks.device.type},"
        f" {threads} CPU thread{'s' if threads > 1 else ''} each"
    )
