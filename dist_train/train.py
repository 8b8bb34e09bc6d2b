"""Training a run: builds what the loop needs, restores the state, keeps the record, says how it ended.

The loop itself is in loop.py.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_train import checkpoint, data, optim, runtime, tasks
from dist_train import state as states
from dist_train.config import Config, RunError, UserError, from_mapping, given_name, load, to_yaml, with_given
from dist_train.interrupt import Interrupt
from dist_train.lock import Lock
from dist_train.loop import loop, why_stopped
from dist_train.meters import Best, Clock
from dist_train.progress import Progress, counted
from dist_train.runtime import Runtime
from dist_train.snapshot import unreadable
from dist_train.tasks import Task
from dist_train.tracking import SECONDS, Tracker, read_status
from dist_train.watchdog import Watchdog


@dataclass(frozen=True)
class Result:
    """How a call of `fit` ended."""

    folder: Path
    state: str  # completed | interrupted
    step: int
    metrics: dict[str, float]  # of an evaluation after this step; empty where there was none
    best: dict[str, float]  # so far: the value of the metric that chooses the best checkpoint, by its name


def fit(
    config: Config | Mapping[str, Any] | str | Path,
    *,
    model: nn.Module | None = None,
    train_data: Any = None,
    eval_data: Any = None,
    task: Task | None = None,
    allow_changes: bool = False,
    started: float | None = None,
) -> Result:
    """Trains what `config` says, or goes on with it where its run's folder holds a checkpoint.

    Args:
        config: a Config, nested dicts, or the path of a YAML file.
        model, train_data, eval_data, task: used instead of what the configuration names. Data sets are
            map-style, of (image `[C, H, W]`, target); `train_data.classes` names the classes, if any.
        allow_changes: go on also with a configuration that is not the one the run was started with.
        started: time.monotonic() from which this attempt's seconds are counted; now, if not given.

    Raises UserError for mistakes in the configuration or the data, RunError for what ended the run.
    """
    started = started or time.monotonic()
    if isinstance(config, Mapping):
        config = from_mapping(config)
    elif not isinstance(config, Config):
        config = load([config])
    config = with_given(config, model=model, data=train_data, task=task)
    with Interrupt() as interrupt:
        ranks = runtime.start(config)
        lock = Lock(config.run_dir) if ranks.is_main else None
        try:
            return _fit(
                config, ranks, interrupt, lock, started, model, train_data, eval_data, task, allow_changes
            )
        except (UserError, RunError) as error:
            runtime.let_go(error)
            raise
        finally:
            if lock:
                lock.release()
            runtime.stop(ranks.accelerator)


def _fit(
    config: Config,
    ranks: Runtime,
    interrupt: Interrupt,
    lock: Lock | None,  # on rank 0
    started: float,
    model: nn.Module | None,
    train_data: Any,
    eval_data: Any,
    task: Task | None,
    allow_changes: bool,
) -> Result:
    """Builds everything, restores the state, runs the loop, and says how it ended."""
    notes: list[str] = []
    with ranks.together():
        runtime.micro_batch(config.train.batch_size, ranks.world_size, config.train.accumulate)
        task = tasks.build(config) if task is None else tasks.complete(task)
        with ranks.main_of_node_first():
            sets = data.build(config, train_data, eval_data)
        if eval_data is not None and train_data is None:
            both = f"{config.data.name} and {given_name(eval_data)}"
            config = replace(config, data=replace(config.data, name=both))
        state = states.build(config, ranks, sets, model, task)
        total = sets.total_steps(config)
        schedule = optim.schedule(config, total, sets.steps_per_epoch(config))
        if lock:
            lock.check(notes.append)
        there = checkpoint.newest_first(config.run_dir / "checkpoints")
        start = states.choose(config, notes.append) if ranks.is_main else None
    start = ranks.from_main(start)
    states.spread(config, state, ranks)
    with ranks.together():
        if start:
            notes += states.restore(config, start, state, ranks, allow_changes)
            _check_length(config, start, state.step, total)
        if bad := unreadable(states.to_dict(config, state, sets, ranks)):
            raise UserError(f"a checkpoint of this run could not be used: {bad}.")
    by = config.checkpoint.best or task.best
    best = Best.parse(by)
    if ranks.from_main(_is_finished(config, state, total)):
        if lock:
            lock.clear()
            print(f"The run is complete: {config.run_dir} (step {state.step:,} of {total:,}).")
        return Result(config.run_dir, "completed", state.step, state.metrics, best.told(state.best))
    with ranks.together():
        newest = start
        if lock:
            _take(lock, config, notes)
            if checkpoint.newest_first(config.run_dir / "checkpoints") != there:
                newest = states.choose(config, notes.append)  # another attempt has saved it meanwhile
    newest = ranks.from_main(newest)
    tracker = saver = None
    with ranks.together():
        if newest and newest != start:
            notes += states.restore(config, newest, state, ranks, allow_changes)
        state.best_by = state.best_by or task.best
        if lock:
            notes = [*_describe(config, ranks, sets, total), *sets.notes, *notes]
            tracker, saver = _open_record(config, ranks, total, started, state, by, notes)
    state.best, state.best_step = ranks.from_main((saver.best, saver.best_step) if saver else None)
    state.best_by = by
    account = tracker.account.seconds if tracker else dict.fromkeys(SECONDS, 0.0)
    watchdog = Watchdog(config, ranks, interrupt, started, lock, tracker.fail if tracker else None)
    interrupt.can_save = True
    end, reason = "failed", ""
    try:
        account["starting"] += time.monotonic() - started
        clock = Clock(account)
        if any(ranks.gather(interrupt.is_set())):  # a signal came while all this was built
            reason = why_stopped(ranks, interrupt)
        else:
            reason = loop(
                config, ranks, interrupt, state, sets, task, tracker, saver, watchdog, clock, schedule, total
            )
        end = "interrupted" if reason else "completed"
    except KeyboardInterrupt:
        end, reason = "interrupted", "a second SIGINT"
        raise
    except BaseException as error:
        watchdog.stop()
        if reason := watchdog.reason:  # a rank that hung has died, and this one has met with that
            raise RunError(reason) from error
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        raise
    finally:
        watchdog.stop()
        if saver and end == "failed":
            saver.wait()
        if tracker:
            tracker.skipped = state.skipped
            tracker.close(end, state.step, reason)
    ranks.from_main(None)  # all end together: srun ends the others when one has exited with 75
    return Result(config.run_dir, end, state.step, state.metrics, best.told(state.best))


def _take(lock: Lock, config: Config, notes: list[str]) -> None:
    """Takes the run's lock. Raises UserError if another attempt has it."""
    try:
        config.run_dir.mkdir(parents=True, exist_ok=True)
        lock.acquire(notes.append)
    except OSError as error:
        raise UserError(f"run.dir: {config.run_dir} can't be written: {error.strerror}.") from None


def _open_record(
    config: Config,
    ranks: Runtime,
    total: int,
    started: float,
    state: states.State,
    by: str,
    notes: list[str],
) -> tuple[Tracker, checkpoint.Checkpoints]:
    """The record of this attempt, and where its checkpoints go, on rank 0; `by` tells which is the best.

    Raises UserError if the run's folder can't be written.
    """
    text = to_yaml(config).encode()
    try:
        checkpoint.write_atomically(config.run_dir / "config.yaml", lambda file: file.write(text))
        tracker = Tracker(config, Progress(total, state.step), total, started, state.step, ranks.world_size)
        tracker.skipped = state.skipped
        for note in notes:
            tracker.say(note)
        tracker.mirror(config)
        saver = checkpoint.Checkpoints(config.run_dir, config.checkpoint.keep, tracker.warn)
        best, best_step = states.best_so_far(config, state, by, tracker.say)
        if checkpoint.newest_first(saver.folder):  # else the state is that of another run, or the first
            saver.go_on(state.step, best, best_step)
    except OSError as error:
        raise UserError(f"run.dir: {config.run_dir} can't be written: {error.strerror}.") from None
    return tracker, saver


def _check_length(config: Config, start: Path, step: int, total: int) -> None:
    """Raises UserError where there is nothing to train after `start`, the state after `step` steps."""
    is_own = start.parent.resolve() == (config.run_dir / "checkpoints").resolve()
    more = f"give more than {step:,} steps by train.steps, or more train.epochs"
    if is_own and step > total:
        raise UserError(
            f"{config.run_dir}: the run is at step {step:,} already, beyond the {total:,} steps of this"
            f" configuration; {more}, or choose another run.name."
        )
    if not is_own and step >= total:
        raise UserError(
            f"resume: {start} is the state of another run after step {step:,}, and this configuration ends"
            f" at step {total:,}; to go on from it, {more}."
        )


def _is_finished(config: Config, state: states.State, total: int) -> bool:
    """Whether the run is complete, and nothing is missing that is made at its end."""
    if state.step < total or not state.metrics:
        return False
    status, run = read_status(config.run_dir), config.run_dir
    return (
        (status.get("state"), status.get("step")) == ("completed", state.step)
        and (run / "model.safetensors").exists()
        and checkpoint.is_linked(run / "checkpoints", state.step, state.best_step)
    )


def _describe(config: Config, ranks: Runtime, sets: data.Data, total: int) -> list[str]:
    """What came up, in two lines."""
    each = " each" if ranks.world_size > 1 else ""
    return [
        f"run {config.run_dir}: {config.model.name} on {config.data.name},"
        f" {len(sets.train):,} training and {counted(len(sets.eval), 'eval sample')}",
        f"{counted(total, 'step')} of {config.train.batch_size:,},"
        f" {counted(ranks.world_size, 'process')} on {ranks.device.type},"
        f" {counted(torch.get_num_threads(), 'CPU thread')}{each}",
    ]
