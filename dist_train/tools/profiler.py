"""`dist-train profile`: where the time of a step goes, by phases and by operators, and a Chrome trace.

Phases are timed without torch's profiler, which slows down what it watches; operators and the trace come
from a few more steps under it. Nothing of a run is written.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, record_function

from dist_train import data, flops, runtime
from dist_train.config import Config, UserError, counted
from dist_train.data.loader import workers
from dist_train.runtime import Runtime
from dist_train.tools.dryrun import DryRun

PHASES = ("data", "forward", "backward", "optimizer", "other")
WARM_UP = 3  # steps that count nowhere, besides those whose batches workers bring at once at the start
WATCHED = 3  # steps under torch's profiler
OPERATORS = 10  # that are shown

Seconds = dict[str, float]  # by phase


class Operator(NamedTuple):
    """What one operator took, of the device where that is a GPU, without those that it called."""

    name: str
    calls: int
    seconds: float


@dataclass(frozen=True)
class Profile:
    """What was measured, on this rank."""

    steps: int
    samples: int  # of these steps, over all ranks
    loop: Seconds
    device: Seconds | None  # of a GPU
    operators: list[Operator]  # of WATCHED steps, the longest first
    memory_gb: float
    flops: float | None  # of a sample in training
    most_per_second: float | None  # samples that all devices could train at their peak


def profile(config: Config, steps: int = 20, trace: Path | None = None) -> Profile | None:
    """Trains some steps and measures where their time goes; None on all ranks but the first.

    Raises UserError if the job can't be trained, or `trace`, the file for a Chrome trace, can't be written.
    """
    ranks = runtime.start(config)
    try:
        with ranks.together():
            if ranks.is_main and trace:
                _check(trace)
        job = Job(config, ranks)
        job.train(WARM_UP + job.workers)
        job.watch.marks.clear()
        job.samples = 0
        job.watch.mark("other")
        job.train(steps)
        job.watch.mark("other")
        samples, (loop, device) = job.samples, job.watch.seconds()
        operators = _operators(job, trace if ranks.is_main else None)
        most, memory = job.learner.most_per_second, ranks.memory()["perf/memory_gb"]
        measured = Profile(steps, samples, loop, device, operators, memory, job.flops, most)
        return measured if ranks.is_main else None
    finally:
        runtime.stop(ranks.accelerator)


class Stopwatch:
    """Where the time between marks goes: that of the loop and, on a GPU, that of the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[tuple[str, float, torch.cuda.Event | None]] = []  # each ends a phase

    def mark(self, phase: str) -> None:
        """Ends a phase, which began with the mark before."""
        event = None
        if self.device.type == "cuda":  # when the device has done all that it was given until now
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
        self.marks.append((phase, time.perf_counter(), event))

    def watched(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, each call of which is a phase, also in a trace."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.mark("other")
            with record_function(phase):
                result = function(*args, **kwargs)
            self.mark(phase)
            return result

        return call

    def seconds(self) -> tuple[Seconds, Seconds | None]:
        """What each phase took of the loop's time, and of a GPU's."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        loop, device = dict.fromkeys(PHASES, 0.0), dict.fromkeys(PHASES, 0.0)
        for (_, begin, begun), (phase, end, ended) in zip(self.marks, self.marks[1:], strict=False):
            loop[phase] += end - begin
            if begun and ended:
                device[phase] += begun.elapsed_time(ended) / 1000
        return loop, device if self.device.type == "cuda" else None


class Job(DryRun):
    """A training whose phases a stopwatch watches."""

    def __init__(self, config: Config, ranks: Runtime) -> None:
        super().__init__(config, ranks)
        self.workers = workers(self.sets.train, config, ranks)
        self.flops = None
        if not self.learner.parallel.is_collective:  # else the layers are spread by now
            self.flops = flops.of_training(self.learner.model, data.first_batch(self.sets.train).inputs)
        self.watch = watch = Stopwatch(ranks.device)
        self.fetch = watch.watched("data", self.fetch)
        self.task.losses = watch.watched("forward", self.task.losses)  # type: ignore[method-assign]
        self.learner.backward = watch.watched("backward", self.learner.backward)
        self.learner.optimizer.register_step_pre_hook(lambda *_: watch.mark("other"))
        self.learner.optimizer.register_step_post_hook(lambda *_: watch.mark("optimizer"))


def _check(trace: Path) -> None:
    """Raises UserError if a trace can't be written there."""
    if trace.exists():
        raise UserError(f"--trace: {trace} exists already; give the name of a new file.")
    if not os.access(trace.parent, os.W_OK | os.X_OK):
        raise UserError(f"--trace: {trace} can't be written: {trace.parent} is no folder to write to.")


def _operators(job: Job, trace: Path | None) -> list[Operator]:
    """The operators of some more steps, which are written to `trace`, too."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it complains of a machine without a GPU
    is_gpu = job.watch.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_gpu else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        job.train(WATCHED)
        if is_gpu:
            torch.cuda.synchronize(job.watch.device)
    if trace:
        part = trace.with_name(f"part-{os.getpid()}-{trace.name}")
        profiler.export_chrome_trace(str(part))
        part.rename(trace)
    found = []
    for event in profiler.key_averages():
        if event.device_type != DeviceType.CPU or "::" not in event.key or event.key.startswith("autograd::"):
            continue  # kernels, which belong to operators; annotations; nodes of the graph
        micros = event.self_device_time_total if is_gpu else event.self_cpu_time_total
        found.append(Operator(event.key, event.count, micros / 1e6))
    return sorted(found, key=lambda operator: -operator.seconds)


def show(measured: Profile) -> None:
    """Prints what was measured: a line for the whole, phases, operators."""
    seconds, samples = sum(measured.loop.values()), measured.samples
    if measured.device:
        seconds = max(seconds, sum(measured.device.values()))
    facts = [
        f"{1000 * seconds / measured.steps:.4g} ms a step ({counted(measured.steps, 'step')})",
        f"{samples / seconds:,.0f} samples/s",
        f"{measured.memory_gb:.3g} GB",
    ]
    if measured.flops:
        facts.append(f"{measured.flops * samples / seconds / 1e9:,.4g} GFLOP/s")
    if measured.most_per_second:
        facts.append(f"MFU {samples / seconds / measured.most_per_second:.1%}")
    console = Console(width=100)
    print(", ".join(facts), end="\n\n")
    console.print(_phases(measured))
    print()
    console.print(_top(measured.operators))


def _phases(measured: Profile) -> Table:
    columns = {"loop": measured.loop} | ({"device": measured.device} if measured.device else {})
    table = table_of("phase", *(heading for name in columns for heading in (f"{name}, ms a step", "share")))
    for phase in PHASES:
        cells = []
        for column in columns.values():
            cells += [f"{1000 * column[phase] / measured.steps:.3f}", _share(column[phase], column.values())]
        table.add_row(phase, *cells)
    return table


def _top(operators: list[Operator]) -> Table:
    table = table_of("operator", "calls a step", "ms a step", "share")
    for name, calls, seconds in operators[:OPERATORS]:
        share = _share(seconds, (operator.seconds for operator in operators))
        table.add_row(name, f"{calls / WATCHED:.4g}", f"{1000 * seconds / WATCHED:.3f}", share)
    return table


def table_of(first: str, *others: str) -> Table:
    """A table of one column of names and others of numbers."""
    table = Table(box=None, pad_edge=False)
    table.add_column(first)
    for heading in others:
        table.add_column(heading, justify="right")
    return table


def _share(value: float, values: Any) -> str:
    return f"{value / (sum(values) or 1):.1%}"
