"""The loop: one for one CPU, one MPS device, or many GPUs on many nodes.

The state of a run is (config, step, tensors); the order of samples, augmentation, dropout and learning
rate are functions of the step. So a run that was killed anywhere goes on exactly, from any checkpoint.
`steps` is the arithmetic; `loop` says when something is logged, evaluated and saved.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from typing import NamedTuple

import torch

from dist_train import checkpoint, data, optim
from dist_train import state as states
from dist_train.config import Config, Every, RunError
from dist_train.evaluate import evaluate
from dist_train.interrupt import Interrupt
from dist_train.keys import key
from dist_train.meters import Best, Clock, Window
from dist_train.runtime import Runtime, seed_device
from dist_train.state import State
from dist_train.tasks import Task
from dist_train.tracking import Tracker
from dist_train.watchdog import Watchdog

MEET_SECONDS = 2.0  # ranks agree on interruptions and timed saves about this often, or more often


class Step(NamedTuple):
    """What an optimizer step leaves, still on the device."""

    lr: float
    losses: list[tuple[torch.Tensor, float]]  # of each micro-batch: of its samples, and their weight
    bad: list[tuple[str, str]]  # samples that could not be read, and why
    skipped: bool


def steps(
    config: Config,
    ranks: Runtime,
    state: State,
    task: Task,
    schedule: Callable[[int], float],
    batches: Iterator[data.Batch],
    stop: int,
    clock: Clock,
    beat: Callable[[int, str], None] = lambda step, doing: None,
) -> Iterator[Step]:
    """Takes the optimizer steps from `state.step` to `stop`, one each time it is asked."""
    accelerator, device = ranks.accelerator, ranks.device
    accumulate, clip_norm = config.train.accumulate, config.train.clip_norm
    model, optimizer = state.trained, state.optimizer
    if accelerator.scaler:  # the wrapper costs 60 us a step, and only fp16's loss scale needs it
        optimizer = accelerator.prepare_optimizer(optimizer)
    # Accelerate's divides the loss by its own accumulation, 1 here; only a loss scale needs it.
    backward = accelerator.backward if accelerator.scaler else torch.Tensor.backward
    model.train()
    trained = [parameter for parameter in state.model.parameters() if parameter.requires_grad]
    skipping = config.on_nonfinite == "skip"
    buffers = list(state.model.buffers()) if skipping else []
    average = None
    if state.average is not None:
        average = optim.average_updater(state.average, state.model, config.train.ema)

    for step in range(state.step, stop):
        optim.scale_lr(optimizer, share := schedule(step))
        before = [buffer.clone() for buffer in buffers]
        detached: list[tuple[torch.Tensor, float]] = []
        bad: list[tuple[str, str]] = []
        for micro in range(accumulate):
            beat(step, "waiting for data")
            asked = time.perf_counter()
            batch = next(batches).to(device, config.channels_last)
            clock.data_seconds += time.perf_counter() - asked
            beat(step, "computing")
            bad += batch.bad
            # Keyed by the part of the global batch, not by the rank alone: 2 processes x 1 part drop
            # the same units as 1 process x 2 parts.
            seed_device(device, key(config.seed, "noise", step, ranks.rank * accumulate + micro))
            with nullcontext() if micro == accumulate - 1 else accelerator.no_sync(model):
                losses, _ = task.losses(model, batch)
                # The mean over the global batch, however it was cut; DDP divides by the world size.
                weight = ranks.world_size / batch.part.total if batch.part.size else 0.0
                weights = torch.full_like(losses, weight)
                if skipping:  # a loss that is not finite on one rank makes the gradient so on all of them
                    weights = weights + 0 * losses.detach().sum()
                backward(losses, gradient=weights)
            detached.append((losses.detach(), weight))
        skipped = False
        if clip_norm or skipping:
            norm = accelerator.clip_grad_norm_(trained, clip_norm or math.inf)
            # The same on all ranks: DDP has added the gradients up.
            skipped = skipping and not norm.isfinite()
        if not skipped or accelerator.scaler:  # the scaler skips by itself, and lowers its scale
            optimizer.step()
        optimizer.zero_grad()
        if skipped:
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
            state.skipped += 1
        elif average:
            average(step)
        state.step, state.metrics = step + 1, {}
        clock.step(batch.part.total)
        yield Step(config.optim.lr * share, detached, bad, skipped)


def loop(
    config: Config,
    ranks: Runtime,
    interrupt: Interrupt,
    state: State,
    sets: data.Data,
    task: Task,
    tracker: Tracker | None,  # on rank 0, as `saver`
    saver: checkpoint.Checkpoints | None,
    watchdog: Watchdog,
    clock: Clock,
    schedule: Callable[[int], float],
    total: int,
) -> str:
    """Trains from `state.step` to `total`; returns why it stopped before the end, or nothing.

    Raises RunError, on all ranks alike, for a loss that is not finite and a state that can't be saved.
    """
    per_epoch = sets.steps_per_epoch(config)
    eval_every, save_every = Every.parse(config.eval.every), Every.parse(config.checkpoint.every)
    best = Best.parse(state.best_by)
    eval_batches = sets.eval_loader(config, ranks)
    batches: Iterator[data.Batch] = iter(sets.train_loader(config, ranks, state.step, total))
    if config.log.batches:
        attempt = ranks.from_main(tracker.attempt if tracker else 0)
        batches = data.recorded(
            batches, config.run_dir / f"batches/attempt-{attempt}-rank-{ranks.rank}.jsonl"
        )
    window, skips = Window(ranks, config.train.accumulate, state.losses), 0
    bad: list[tuple[str, str]] = []
    meet_at, saved_at = state.step + 1, time.monotonic()

    def measure() -> None:
        def stop() -> bool:
            watchdog.beat(state.step, "evaluating")
            return interrupt.is_set()

        with clock.aside("productive"):
            state.metrics, unread = evaluate(
                state.evaluated, eval_batches, task, ranks, config.channels_last, stop
            )
        if tracker:
            tracker.bad_samples(unread)
            if state.metrics:
                tracker.log(state.step, (state.step - 1) // per_epoch, state.metrics)

    def save() -> None:
        watchdog.beat(state.step, "saving")
        if tracker:
            tracker.flush()
        state.losses = window.losses
        with clock.aside("saving"):
            if saver and saver.wait():  # the best one may be among those that failed
                state.best, state.best_step = saver.best, saver.best_step
            if best.improves(state.metrics, state.best):
                state.best, state.best_step = state.metrics[best.metric], state.step
            if saver:
                saver.save(states.to_dict(config, state, sets, ranks))

    def seconds_to_save() -> float:
        """After how many seconds a save is due, or 0 for never."""
        if save_every.auto and saver and tracker:
            return saver.interval(tracker.between_interruptions)
        return save_every.seconds

    if (
        state.step and not state.metrics and (state.step == total or eval_every.due(state.step, per_epoch))
    ):  # the attempt before was interrupted ahead of this evaluation
        measure()
        if not state.metrics:
            return why_stopped(ranks, interrupt)
        save()

    for done in steps(config, ranks, state, task, schedule, batches, total, clock, watchdog.beat):
        window.add(done.losses)
        bad += done.bad
        if tracker:
            tracker.progress.move(state.step)
        skips = skips + 1 if done.skipped else 0
        if skips > config.max_skips:
            raise RunError(
                _nonfinite(config, ranks, sets, state.step, f"{skips} steps in a row were skipped")
            )
        last = state.step == total
        log_due = last or state.step % config.log.every == 0
        eval_due = last or eval_every.due(state.step, per_epoch)
        save_due = last or save_every.due(state.step, per_epoch)
        if not (log_due or eval_due or save_due or state.step >= meet_at):
            continue
        # The one wait for the device and the other ranks: losses, and with them what each rank asks.
        watchdog.beat(state.step, "waiting for other ranks")
        timed = ranks.is_main and 0 < seconds_to_save() < time.monotonic() - saved_at
        stop_asked, save_now, gone, seconds, unread = window.meet(
            interrupt.is_set() or (saver is not None and saver.is_broken),
            timed,
            ranks.is_main and not config.run_dir.exists(),
            clock.seconds_per_step,
            len(bad),
        )
        clock.settle()
        if gone:
            raise RunError(f"{config.run_dir} was deleted or moved under way; this attempt ends, unsaved.")
        if config.on_nonfinite == "stop" and (ago := window.first_nonfinite()) is not None:
            raise RunError(_nonfinite(config, ranks, sets, state.step - ago, "its loss is not finite"))
        pace = ranks.world_size * MEET_SECONDS / seconds if seconds else 1  # after step 1 it isn't known
        meet_at = state.step + max(1, min(config.log.every, int(pace)))
        if unread:
            told = [item for items in ranks.gather(bad) for item in items]
            bad.clear()
            if tracker:
                tracker.bad_samples(told)
        if log_due:
            row = {"train/loss": window.take(), "lr": done.lr, **clock.take(total - state.step)}
            if tracker:
                tracker.log(state.step, (state.step - 1) // per_epoch, row)
        stop = bool(stop_asked)
        if eval_due and not stop:
            measure()
            stop = not state.metrics  # a signal came in the middle of it: the next attempt repeats it
        is_best = best.improves(state.metrics, state.best)
        if save_due or save_now or stop or is_best:
            save()
            saved_at = time.monotonic()
        if tracker:
            tracker.skipped = state.skipped
            tracker.best = best.told(state.best)
            tracker.status("running", state.step)
        if stop:
            break
    failure = ""
    with clock.aside("saving"):
        if saver and saver.wait():  # once more: there may be room now
            saver.save(states.to_dict(config, state, sets, ranks))
            failure = saver.wait()
        failure = ranks.from_main(failure)
    if failure:
        raise RunError(f"the state after step {state.step:,} is not saved: {failure}.")
    if state.step < total or not state.metrics:
        return why_stopped(ranks, interrupt)
    if saver:
        names = {"classes": "\n".join(map(str, sets.classes))}
        try:
            saver.prune()  # where an attempt was killed between its last save and this
            checkpoint.save_weights(config.run_dir / "model.safetensors", state.evaluated, names)
        except OSError as error:
            failure = f"{config.run_dir}/model.safetensors could not be written: {error.strerror}"
    if failure := ranks.from_main(failure):
        raise RunError(f"{failure}; the checkpoint is saved, the same command writes it again.")
    return ""


def why_stopped(ranks: Runtime, interrupt: Interrupt) -> str:
    """The reason of the first rank that was asked to stop; all ranks ask together."""
    return next(filter(None, ranks.gather(interrupt.reason)), "")


def _nonfinite(config: Config, ranks: Runtime, sets: data.Data, step: int, what: str) -> str:
    """Tells what led to a number that is not finite; rank 0 writes the samples of it to nonfinite.json.

    A gradient that is not finite shows in the loss of the step after it: both steps are told.
    """
    command = f"dist-train replay {config.run_dir} {step}"
    if ranks.is_main:
        told: dict[str, object] = {"step": step, "what": what, "replay": command}
        for number in (step - 1, step):
            if number:
                told[f"samples of step {number}"] = [
                    {"rank": rank, **sets.told(index)}
                    for rank in range(ranks.world_size)
                    for part in sets.sampler(config, rank, ranks.world_size, number - 1, number)
                    for index in part.indices[: part.size].tolist()
                ]
        text = json.dumps(told, indent=1).encode()
        with suppress(OSError):
            checkpoint.write_atomically(config.run_dir / "nonfinite.json", lambda file: file.write(text))
    return (
        f"step {step:,}: {what}; {config.run_dir}/nonfinite.json lists its samples, `{command}` rebuilds it;"
        f" a lower optim.lr than {config.optim.lr:g} often helps."
    )
