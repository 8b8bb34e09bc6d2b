"""Training a run: builds what the loop needs, restores the state, keeps the record, says how it ended.

The loop itself is in trainer.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_train import checkpoint, data, optim, runtime, tasks
from dist_train import state as states
from dist_train.checkpoint.memory import Memory
from dist_train.checkpoint.snapshot import unreadable
from dist_train.cluster import board
from dist_train.config import (
    Config,
    RunError,
    UserError,
    counted,
    from_mapping,
    given_name,
    load,
    to_yaml,
    with_given,
)
from dist_train.distill import taught
from dist_train.guard.guard import Guard
from dist_train.learner import Learner
from dist_train.meters import Best, stop_when
from dist_train.models import pretrained, weights
from dist_train.optim import rates
from dist_train.parts import keeps_bits, part_size
from dist_train.record.history import read_status
from dist_train.record.record import Begin, Record
from dist_train.record.wandb import Mirror
from dist_train.runtime import Runtime
from dist_train.state import State
from dist_train.tasks import Task
from dist_train.trainer import Job, Trainer

# The first optimizer imports much of torch that `import torch` leaves out: here, with all other imports.
torch.optim.SGD([torch.zeros(1)])


@dataclass(frozen=True)
class Result:
    """How a call of `fit` ended."""

    folder: Path
    state: str  # completed | interrupted
    step: int
    metrics: dict[str, float]  # of an evaluation after this step; empty where there was none
    best: dict[str, float]  # so far: the value of the metric that chooses the best checkpoint, by its name
    stopped: str = ""  # why it was complete before its last step, by `train.stop_when`


@dataclass(frozen=True)
class Given:
    """What a program gave instead of what the configuration names."""

    model: nn.Module | None = None
    train_data: Any = None
    eval_data: Any = None
    task: Any = None
    on_row: Callable[[dict[str, Any]], Any] | None = None
    allow_changes: bool = False


@dataclass
class Kept:
    """What a process keeps from one attempt to the next, when another rank has died and is replaced."""

    data: data.Data | None = None
    memory: Memory | None = None  # None where the state of a dead rank is nobody else's
    mirror: Mirror | None = None

    def prepare(self, config: Config) -> None:
        """Does what can be done before it is known which rank this process will be."""
        self.data = data.build(pretrained.with_own_transforms(config), None, None)


def fit(
    config: Config | Mapping[str, Any] | str | Path,
    *,
    model: nn.Module | None = None,
    train_data: Any = None,
    eval_data: Any = None,
    task: Any = None,
    on_row: Callable[[dict[str, Any]], Any] | None = None,
    allow_changes: bool = False,
    started: float | None = None,
) -> Result:
    """Trains what `config` says, or goes on with it where its run's folder holds a checkpoint.

    Args:
        config: a Config, nested dicts, or the path of a YAML file.
        model, train_data, eval_data, task: used instead of what the configuration names. Data sets are
            map-style, of (image `[C, H, W]`, target); `train_data.classes` names the classes, if any.
        on_row: called on rank 0 with each row of metrics as it is recorded; if it returns False, the run
            saves and stops, as by a signal.
        allow_changes: go on also with a configuration that is not the one the run was started with.
        started: time.monotonic() from which this attempt's seconds are counted; now, if not given.

    Raises UserError for mistakes in the configuration or the data, RunError for what ended the run.
    """
    if isinstance(config, Mapping):
        config = from_mapping(config)
    elif not isinstance(config, Config):
        config = load([config])
    config = with_given(config, model=model, data=train_data, task=task)
    given = Given(model, train_data, eval_data, task, on_row, allow_changes)
    return run(config, given, Kept(), started or time.monotonic())


def run(config: Config, given: Given, kept: Kept, started: float) -> Result:
    """Trains as `fit` does, in as many attempts as it takes when other ranks die and are replaced."""
    config = pretrained.with_own_transforms(config)
    with Guard(config, started) as guard:
        while True:
            try:
                return _meet_and_fit(config, given, kept, guard)
            except RuntimeError as error:
                if not guard.lost_another(error):
                    raise
                runtime.let_go(error)
                guard.meet_anew()


def _meet_and_fit(config: Config, given: Given, kept: Kept, guard: Guard) -> Result:
    """One attempt, from meeting the other ranks to leaving them."""
    ranks = runtime.start(config)
    try:
        if board.current and _can_be_replaced(config, ranks):
            kept.memory = kept.memory or Memory()
        return _fit(config, ranks, guard, given, kept)
    except (UserError, RunError) as error:
        runtime.let_go(error)
        raise
    finally:
        guard.release()
        runtime.stop(ranks.accelerator)


def _fit(config: Config, ranks: Runtime, guard: Guard, given: Given, kept: Kept) -> Result:
    """Builds everything, restores the state, trains, and says how it ended."""
    notes: list[str] = []
    config, job, task = _prepare(config, ranks, given, kept)
    with ranks.together():
        begun = checkpoint.newest_first(config.run_dir / "checkpoints")  # nothing but these is read then
        first = weights.first(config) if ranks.is_main and not begun else None
    learner = Learner(config, ranks, job.data, task, given.model, first)
    state = State(learner)
    with ranks.together():
        guard.check(ranks, notes.append)
        existing = checkpoint.newest_first(config.run_dir / "checkpoints")
        start = states.choose(config, notes.append) if ranks.is_main else None
    start = ranks.from_main(start)
    if kept.memory:
        kept.memory.share(ranks)
    with ranks.together():
        notes += _restore(config, start, state, kept, given.allow_changes)
        if start:
            _check_length(job, start, state)
        # Refuses a batch that can't be cut so, before anything is touched.
        part_size(config.train.batch_size, learner.parts, ranks.world_size, config.train.accumulate)
    bad = unreadable(states.to_dict(config, state, job.data))
    with ranks.together():
        if bad:
            raise UserError(f"a checkpoint of this run could not be used: {bad}.")
    by = config.checkpoint.best or task.best
    best = Best.parse(by)
    if ranks.from_main(_is_finished(job, state)):
        guard.clear()
        if ranks.is_main:
            why = f": {job.stopped(state)}" if job.stopped(state) else ""
            print(f"The run is complete: {config.run_dir} (step {learner.step:,} of {job.total:,}{why}).")
        return _result(job, state, best, "completed")
    with ranks.together():
        newest = start
        guard.take(notes.append)
        if ranks.is_main and checkpoint.newest_first(config.run_dir / "checkpoints") != existing:
            newest = states.choose(config, notes.append)  # another attempt has saved it meanwhile
    newest = ranks.from_main(newest)
    with ranks.together():
        if newest != start:
            notes += _restore(config, newest, state, kept, given.allow_changes)
        state.best_by = state.best_by or task.best
        try:
            _write_config(config, ranks)
            if first and not newest:
                weights.keep(config, first)
            first = None  # takes as much memory as the model
            begin = Begin(learner.step, job.total, ranks.world_size, learner.parts, ranks.machine())
            record = Record(config, begin, guard.started, ranks.is_main, given.on_row)
            saver = _open(job, state, by, record, [*_describe(job, learner), *notes])
            record.mirror(config, kept.mirror)
            saver.memory, kept.mirror = kept.memory, record.mirrored
        except OSError as error:
            raise UserError(f"run.dir: {config.run_dir} can't be written: {error.strerror}.") from None
    state.best, state.best_step = ranks.from_main((saver.best, saver.best_step))
    state.best_by = by
    guard.watch(ranks, record.fail if ranks.is_main else None, can_meet_anew=kept.memory is not None)
    end = _attempt(job, state, record, saver, guard)
    ranks.from_main(None)  # all end together: srun ends the others when one has exited with 75
    return _result(job, state, best, end)


def _result(job: Job, state: State, best: Best, end: str) -> Result:
    named, stopped = best.named(state.best), job.stopped(state)
    return Result(job.config.run_dir, end, state.step, state.metrics, named, stopped)


def _attempt(job: Job, state: State, record: Record, saver: checkpoint.Checkpoints, guard: Guard) -> str:
    """Trains, closes the record, and returns how that ended: `completed` or `interrupted`."""
    end, reason = "failed", ""
    try:
        record.account.seconds["starting"] += time.monotonic() - guard.started
        trainer = Trainer(job, state, record, saver, guard)
        if any(job.ranks.gather(guard.asked)):  # a signal came while all this was built
            reason = guard.why_stopped(job.ranks)
        else:
            reason = trainer.train()
        end, reason = "interrupted" if reason else "completed", reason or job.stopped(state)
    except KeyboardInterrupt:
        end, reason = "interrupted", "a second SIGINT"
        raise
    except BaseException as error:
        guard.end_watch()
        if reason := guard.hang:  # a rank that hung has died, and this one has met with that
            raise RunError(reason) from error
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        if guard.lost_another(error):
            end = "running"  # there is a next attempt at once
        raise
    finally:
        guard.end_watch()
        if end in ("failed", "running"):
            saver.close()
        record.close(end, state.step, state.learner.skipped, reason)
    return end


def _can_be_replaced(config: Config, ranks: Runtime) -> bool:
    """Whether a rank's death leaves the others what they need: the whole state, and a device that works."""
    is_whole = config.parallel.name == "ddp" and not config.checkpoint.sharded
    return is_whole and ranks.device.type == "cpu" and ranks.world_size > 1


def _restore(config: Config, file: Path | None, state: State, kept: Kept, allow_changes: bool) -> list[str]:
    """Fills `state` from a file or the copy in memory, whichever is newer; returns notes for the user."""
    is_own = file is not None and file.parent.resolve() == (config.run_dir / "checkpoints").resolve()
    if kept.memory and kept.memory.step >= (checkpoint.step_of(file) if file and is_own else 0):
        return states.restore_copy(kept.memory, state)
    return states.restore(config, file, state, allow_changes) if file else []


def _prepare(config: Config, ranks: Runtime, given: Given, kept: Kept) -> tuple[Config, Job, Task]:
    """What is to be done, on all ranks; and the configuration that says whose data that is."""
    with ranks.together():
        task = tasks.build(config) if given.task is None else tasks.complete(given.task)
        with ranks.main_of_node_first():
            found = (None, None) if kept.data else data.opened(config, given.train_data, given.eval_data)
        kept.data = sets = kept.data or data.build(config, *found)
        if given.eval_data is not None and given.train_data is None:
            both = f"{config.data.name} and {given_name(given.eval_data)}"
            config = replace(config, data=replace(config.data, name=both))
        total = sets.total_steps(config)
        schedule = rates.schedule(config, total, sets.steps_per_epoch(config))
        rules = stop_when(config, config.checkpoint.best or task.best)
        task, notes = taught(config, task, ranks, sets)
    sets = replace(sets, notes=[*sets.notes, *notes])
    return config, Job(config, ranks, sets, total, schedule, rules), task


def _write_config(config: Config, ranks: Runtime) -> None:
    if ranks.is_main:
        text = to_yaml(config).encode()
        checkpoint.write_atomically(config.run_dir / "config.yaml", lambda file: file.write(text))


def _open(job: Job, state: State, by: str, record: Record, notes: list[str]) -> checkpoint.Checkpoints:
    """Where checkpoints go, `by` tells which is the best; the record of the attempt begins with `notes`."""
    config = job.config
    saver = _saver(config, job.ranks, record)
    for note in notes:
        record.say(note)
    if job.ranks.is_main:
        best, best_step = states.best_so_far(config, state, by, record.say)
        if files := checkpoint.newest_first(saver.folder):  # else the state is of another run, or the first
            saver.go_on(min(state.step, checkpoint.step_of(files[0])), best, best_step)
    return saver


def _saver(config: Config, ranks: Runtime, record: Record) -> checkpoint.Checkpoints:
    run, keep = config.run_dir, config.checkpoint.keep
    if not config.checkpoint.sharded:
        return checkpoint.Checkpoints(run, keep, record.warn, ranks.is_main)
    from dist_train.checkpoint.sharded_saver import ShardedCheckpoints  # takes a second to import

    return ShardedCheckpoints(run, keep, record.warn, ranks, config.timeout_seconds)


def _check_length(job: Job, start: Path, state: State) -> None:
    """Raises UserError where there is nothing to train after `start`, whose state that is."""
    config, step, total = job.config, state.step, job.total
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
    if not is_own and (why := job.stopped(state)):
        raise UserError(
            f"resume: {start} is the state of another run, which train.stop_when ends there ({why}); give"
            " another rule, or begin with its weights alone by model.init."
        )


def _is_finished(job: Job, state: State) -> bool:
    """Whether the run is complete, and nothing is missing that is made at its end."""
    if not job.is_done(state):
        return False
    run = job.config.run_dir
    status = read_status(run)
    return (
        (status.get("state"), status.get("step")) == ("completed", state.step)
        and (run / "model.safetensors").exists()
        and checkpoint.is_linked(run / "checkpoints", state.step, state.best_step)
    )


def _describe(job: Job, learner: Learner) -> list[str]:
    """What came up, in a few lines."""
    config, ranks, sets = job.config, job.ranks, job.data
    each = " each" if ranks.world_size > 1 else ""
    lines = [
        f"run {config.run_dir}: {config.model.name} on {config.data.name},"
        f" {len(sets.train):,} training and {counted(len(sets.eval), 'eval sample')}",
        f"{counted(job.total, 'step')} of {config.train.batch_size:,},"
        f" {counted(ranks.world_size, 'process')} on {ranks.device.type},"
        f" {counted(torch.get_num_threads(), 'CPU thread')}{each}",
    ]
    if not keeps_bits(learner.parts, ranks.world_size):
        lines.append(
            f"{ranks.world_size} processes can't hold whole subtrees of {learner.parts} parts: what they"
            " compute agrees with other numbers of processes but for rounding"
        )
    if len(learner.optimizer.param_groups) > 1:
        lines.append(optim.describe(learner.optimizer))
    if fetching := data.described(sets.train, config, ranks):
        lines.append(fetching)
    return [*lines, *sets.notes, *pretrained.described(config), *filter(None, [learner.begins])]
