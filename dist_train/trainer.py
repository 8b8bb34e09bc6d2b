"""The loop: one for one CPU, one MPS device, or many GPUs on many nodes.

The state of a run is (config, step, tensors); the order of samples, augmentation, dropout and learning rate
are functions of the step. So a run that was killed anywhere goes on exactly, from any checkpoint.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from dist_train import checkpoint, data, tables
from dist_train import state as states
from dist_train.config import Config, Every, RunError, StopWhen
from dist_train.evaluate import Unread
from dist_train.guard.guard import Guard
from dist_train.histograms import histograms
from dist_train.learner import Step
from dist_train.meters import Best, Clock, Window
from dist_train.optim.rates import History
from dist_train.outcomes import Keeping
from dist_train.record.record import Record
from dist_train.runtime import Runtime
from dist_train.state import State

NOT_PLAIN = "what the model keeps there is more than plain values, and stands in checkpoints only"
MEET_SECONDS = 2.0  # ranks agree on interruptions and timed saves about this often, or more often


@dataclass(frozen=True)
class Job:
    """What is to be done, a function of the configuration and the data."""

    config: Config
    ranks: Runtime
    data: data.Data
    total: int  # optimizer steps of the whole run
    schedule: Callable[[int, History], float]  # the share of the learning rate at a step
    stop_when: list[StopWhen]

    @cached_property
    def per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return self.data.steps_per_epoch(self.config)

    def stopped(self, state: State) -> str:
        """Why the run is complete at this step by `train.stop_when`, or nothing."""
        reasons = (rule.reached(state.history) for rule in self.stop_when if state.metrics)
        return next(filter(None, reasons), "")

    def is_done(self, state: State) -> bool:
        """Whether there is no step to take any more, and the last evaluation is there."""
        return bool(state.metrics) and (state.step >= self.total or bool(self.stopped(state)))


class Due(NamedTuple):
    """What comes after a step."""

    log: bool
    eval: bool
    save: bool


class Agreed(NamedTuple):
    """What ranks have agreed on."""

    stop: bool
    save: bool
    copy: bool


class Trainer:
    """One attempt at a run, from `state` on; on each rank."""

    def __init__(
        self, job: Job, state: State, record: Record, saver: checkpoint.Checkpoints, guard: Guard
    ) -> None:
        self.job, self.state, self.learner = job, state, state.learner
        self.record, self.saver, self.guard = record, saver, guard
        self.config, self.ranks = config, ranks = job.config, job.ranks
        self.clock = Clock(record.account.seconds)
        self.window = Window(ranks, state.window)
        self.best = Best.parse(state.best_by)
        self.eval_every, self.save_every = (
            Every.parse(config.eval.every),
            Every.parse(config.checkpoint.every),
        )
        self.learner.parallel.meeting[:] = guard.meeting
        parts, start = self.learner.parts, self.learner.step
        self.eval_batches = job.data.eval_loader(config, ranks, parts)
        self.feed = job.data.train_feed(config, ranks, start, job.total, parts)
        self.batches: Iterator[data.Batch] = self.feed
        if config.log.batches:
            attempt = ranks.from_main(record.attempt)
            path = config.run_dir / f"batches/attempt-{attempt}-rank-{ranks.rank}.jsonl"
            self.batches = data.recorded(self.batches, path)
        self.unread: Unread = []
        self.skips = 0  # steps in a row that were dropped
        self.meet_at, self.saved_at = start + 1, time.monotonic()

    def train(self) -> str:
        """Trains to the end of the run; returns why it stopped before, or nothing.

        Raises RunError, on all ranks alike, for a loss that is not finite and a state that can't be saved.
        """
        learner, guard = self.learner, self.guard
        if self.is_evaluation_missing() and not (self.evaluate() and self.save()):
            return guard.why_stopped(self.ranks)
        while learner.step < self.job.total and not self.job.is_done(self.state):
            due = self.due(learner.step + 1)
            share = self.job.schedule(learner.step, self.state.history)
            step = learner.train_step(self.parts(), share, with_norm=due.log)
            self.take(step)
            if not any(due) and learner.step < self.meet_at:
                continue
            agreed = self.meet()
            if due.log:
                self.log(step, due)
            stop = agreed.stop or (due.eval and not self.evaluate())  # the next attempt repeats it
            is_last = self.job.is_done(self.state)
            improves = self.best.improves(self.state.metrics, self.state.best)
            if due.save or agreed.save or stop or is_last or improves:
                self.save()
            elif agreed.copy:
                self.copy()
            self.record.running(learner.step, learner.skipped, self.best.named(self.state.best))
            if stop:
                break
        self.finish_saving()
        if not self.job.is_done(self.state):
            return guard.why_stopped(self.ranks)
        self.export()
        return ""

    def due(self, step: int) -> Due:
        """What comes after `step` optimizer steps, by their number."""
        last, per_epoch = step == self.job.total, self.job.per_epoch
        return Due(
            last or step % self.config.log.every == 0,
            last or self.eval_every.due(step, per_epoch),
            last or self.save_every.due(step, per_epoch),
        )

    def parts(self) -> Iterator[data.Batch]:
        """This rank's parts of the next step, on the device."""
        step = self.learner.step
        for _ in range(self.learner.per_rank):
            self.guard.beat(step, "waiting for data")
            batch = next(self.batches)
            self.guard.beat(step, "computing")
            self.unread += batch.bad
            samples = batch.part.total
            yield batch
        self.clock.step(samples)

    def take(self, step: Step) -> None:
        """Takes up what a step leaves; nothing waits for the device."""
        self.state.metrics = {}
        self.window.add(step.names, step.sums, step.weighted)
        self.record.move(self.learner.step)
        self.skips = self.skips + 1 if step.skipped else 0
        if self.skips > self.config.max_skips:
            self.fail_nonfinite(self.learner.step, f"{self.skips} steps in a row were skipped")

    def meet(self) -> Agreed:
        """The one wait for the device and the other ranks: losses, and with them what each rank asks."""
        step, ranks = self.learner.step, self.ranks
        self.guard.beat(step, "waiting for other ranks")
        timed = ranks.is_main and 0 < self.seconds_to_save() < time.monotonic() - self.saved_at
        every = min(MEET_SECONDS, self.saver.copy_seconds) if ranks.is_main else 0.0
        stop, save, copy, gone, every, seconds, unread = self.window.meet(
            self.guard.asked or self.saver.is_broken,
            timed,
            ranks.is_main and self.saver.is_copy_due(),
            ranks.is_main and not self.config.run_dir.exists(),
            every,
            self.clock.seconds_per_step,
            len(self.unread),
        )
        self.clock.settle(*self.feed.waited())
        if gone:
            raise RunError(
                f"{self.config.run_dir} was deleted or moved under way; this attempt ends, unsaved."
            )
        ago = self.window.first_nonfinite()
        if self.config.on_nonfinite == "stop" and ago is not None:
            self.fail_nonfinite(step - ago, "its loss is not finite")
        pace = ranks.world_size * every / seconds if seconds else 1  # after step 1 it isn't known
        self.meet_at = step + max(1, min(self.config.log.every, int(pace)))
        if unread:
            self.record.bad_samples([item for items in ranks.gather(self.unread) for item in items])
            self.unread.clear()
        return Agreed(bool(stop), bool(save), bool(copy))

    def log(self, step: Step, due: Due) -> None:
        """Records a row of the steps since the last one."""
        values = self.window.take() | self.learner.rates()
        if step.norm is not None:
            values["train/grad_norm"] = float(step.norm)
        speed = self.clock.take(self.job.total - self.learner.step, self.learner.most_per_second)
        self.row("train", values | speed | self.ranks.memory(), more=due.eval)

    def evaluate(self) -> bool:
        """Measures the eval set; False if somebody asked to stop meanwhile."""

        def stop() -> bool:
            self.guard.beat(self.learner.step, "evaluating")
            return self.guard.asked

        may_be_last = self.learner.step >= self.job.total or bool(self.job.stop_when)
        keeping = tables.keeping(self.config, self.learner.task, may_be_last)
        with self.clock.excluded("productive"):
            metrics, unread = self.learner.evaluate(self.eval_batches, stop, keeping)
        self.record.bad_samples(unread)
        if metrics:
            self.state.evaluated(metrics)
            self.show(keeping)
            reason = self.job.stopped(self.state)
            self.row("eval", metrics | ({"stopped": reason} if reason else {}))
        return bool(metrics)

    def show(self, keeping: Keeping | None) -> None:
        """Gives the record what an evaluation has to show beyond numbers, if that is wanted."""
        step, options = self.learner.step, self.config.wandb
        if self.config.log.histograms:
            self.record.histograms(step, histograms(self.learner.evaluated, self.ranks))
        if keeping and (options.tables == "evaluations" or self.job.is_done(self.state)):
            outcomes = keeping.gathered(self.ranks)
            if self.ranks.is_main:
                self.record.tables(step, tables.of(outcomes, self.job.data, options.images))

    def row(self, kind: str, values: Mapping[str, float | str], more: bool = False) -> None:
        """Records a row after the step taken last; whoever reads it may ask to stop."""
        step = self.learner.step
        if not self.record.row(kind, step, (step - 1) // self.job.per_epoch, values, more):
            self.guard.request("on_row returned False")

    def save(self) -> bool:
        """Saves the state, behind the loop's back."""
        state, saver = self.state, self.saver
        self.guard.beat(self.learner.step, "saving")
        self.record.flush()
        state.window = self.window.values
        with self.clock.excluded("saving"):
            failure, *best = self.ranks.from_main((saver.wait(), saver.best, saver.best_step))
            if failure:  # the best one may be among those that failed
                state.best, state.best_step = best
            if self.best.improves(state.metrics, state.best):
                state.best, state.best_step = state.metrics[self.best.metric], self.learner.step
            saver.save(states.to_dict(self.config, state, self.job.data))
        self.saved_at = time.monotonic()
        return True

    def copy(self) -> None:
        """Copies the state to memory: from there ranks go on when one of them has died and is replaced."""
        if memory := self.saver.memory:
            with self.clock.excluded("saving"):
                self.state.window = self.window.values
                memory.take(lambda: states.to_dict(self.config, self.state, self.job.data))

    def seconds_to_save(self) -> float:
        """After how many seconds a save is due, or 0 for never."""
        if self.save_every.auto:
            return self.saver.interval(self.record.between_interruptions)
        return self.save_every.seconds

    def is_evaluation_missing(self) -> bool:
        """Whether the attempt before was interrupted ahead of the evaluation at this step."""
        step = self.learner.step
        return bool(step and not self.state.metrics and self.due(step).eval)

    def finish_saving(self) -> None:
        """Waits for the save in flight. Raises RunError if the state can't be saved."""
        with self.clock.excluded("saving"):
            failure = self.ranks.from_main(self.saver.wait())
            if failure:  # once more: there may be room now
                self.saver.save(states.to_dict(self.config, self.state, self.job.data))
                failure = self.ranks.from_main(self.saver.wait())
        if failure:
            raise RunError(f"the state after step {self.learner.step:,} is not saved: {failure}.")

    def export(self) -> None:
        """Leaves what a complete run leaves: checkpoints that are kept, and the weights alone."""
        failure, run = "", self.config.run_dir
        names = {"classes": "\n".join(map(str, self.job.data.classes))}
        weights = self.learner.weights()
        try:
            self.saver.prune()  # where an attempt was killed between its last save and this
            if self.ranks.is_main:
                lost = checkpoint.save_weights(run / "model.safetensors", weights, names)
                if lost:
                    self.record.say(f"model.safetensors lacks {', '.join(lost)}: {NOT_PLAIN}")
        except OSError as error:
            failure = f"{run}/model.safetensors could not be written: {error.strerror}"
        if failure := self.ranks.from_main(failure):
            raise RunError(f"{failure}; the checkpoint is saved, the same command writes it again.")

    def fail_nonfinite(self, step: int, what: str) -> None:
        """Raises RunError for a number that is not finite; rank 0 writes the samples to nonfinite.json.

        A gradient that is not finite shows in the loss of the step after it: both steps are listed.
        """
        config, sets = self.config, self.job.data
        command = f"dist-train replay {config.run_dir} {step}"
        if self.ranks.is_main:
            found: dict[str, object] = {"step": step, "what": what, "replay": command}
            for number in (step - 1, step):
                if number:
                    found[f"samples of step {number}"] = [
                        {"rank": part.number // self.learner.per_rank, **sets.known(index)}
                        for part in sets.order(config).parts(number - 1, self.learner.parts)
                        for index in part.indices[: part.size].tolist()
                    ]
            text = json.dumps(found, indent=1).encode()
            with suppress(OSError):
                checkpoint.write_atomically(config.run_dir / "nonfinite.json", lambda file: file.write(text))
        raise RunError(
            f"step {step:,}: {what}; {config.run_dir}/nonfinite.json lists its samples, `{command}` rebuilds"
            f" it; a lower optim.lr than {config.optim.lr:g} often helps."
        )
