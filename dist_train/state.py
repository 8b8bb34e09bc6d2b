"""All that changes in a run, how it becomes a checkpoint, and how a run goes on from one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_train import checkpoint
from dist_train.checkpoint.memory import Memory
from dist_train.checkpoint.snapshot import to_cpu
from dist_train.cluster import board
from dist_train.config import Config, UserError, changes, completed, counted, to_mapping
from dist_train.data import Data
from dist_train.learner import Learner
from dist_train.meters import Best


@dataclass
class State:
    """The state of a run: what has learned, and where the run stands."""

    learner: Learner
    best: float | None = None  # best value of the metric that chooses the best checkpoint
    best_step: int | None = None  # of that checkpoint; None also in files of older versions
    best_by: str = ""  # which metric that is, as "max eval/accuracy"; empty: the task's own
    metrics: dict[str, float] = field(default_factory=dict)  # of an evaluation at this very step
    window: dict[str, list[float]] = field(default_factory=dict)  # of the steps since the last row of metrics
    history: dict[str, list[float]] = field(default_factory=dict)  # of each metric in all evaluations so far

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.learner.step

    def evaluated(self, metrics: Mapping[str, float]) -> None:
        """Takes up what an evaluation at this step has given."""
        self.metrics = dict(metrics)
        for name, value in metrics.items():
            self.history.setdefault(name, []).append(value)


def to_dict(config: Config, state: State, data: Data) -> dict[str, Any]:
    """What a checkpoint holds: everything that a run, an evaluation or a prediction starts from.

    All ranks come here together.
    """
    return {
        "format": checkpoint.FORMAT,
        "config": to_mapping(config),
        **state.learner.state_dict(),
        "best": state.best,
        "best_step": state.best_step,
        "best_by": state.best_by,
        "metrics": state.metrics,
        "window": state.window,
        "history": state.history,
        "teacher": teacher_of(state),
        "world_size": state.learner.ranks.world_size,  # of no meaning for the steps to come
        "classes": list(map(str, data.classes)),
        "sample_shape": list(data.sample_shape),
    }


def choose(config: Config, warn: Any) -> Path | None:
    """The whole checkpoint from which the run goes on, or None for a fresh start.

    Raises UserError where `resume` forbids to go on, and where no checkpoint is whole.
    """
    folder = config.run_dir / "checkpoints"
    existing = checkpoint.newest_first(folder)
    if (
        config.resume == "never"
        and not board.is_restart()
        and (existing or (config.run_dir / "metrics.jsonl").exists())
    ):
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
                checkpoint.verify(checkpoint.path_of(folder, state.best_step))
                return state.best, state.best_step
            except checkpoint.Damaged as error:
                say(f"{error} The best of those that are left takes its place.")
    value = step = None
    for path in reversed(files):  # of equal ones the first is the best
        metrics = _metrics(path)
        if best.metric in metrics and best.improves(metrics, value):
            value, step = metrics[best.metric], checkpoint.step_of(path)
    if state.best_by != by:
        found = f"that of step {step:,} is the best ({value:.4g})" if step is not None else "none has one"
        say(f"checkpoint.best: by {by} now, by {state.best_by} before; of the checkpoints here {found}.")
    return value, step


def _metrics(path: Path) -> dict[str, float]:
    """The evaluation that a checkpoint holds; nothing of a damaged one."""
    if not checkpoint.is_whole(path):
        return {}
    return checkpoint.load(path, verified=True, wanted=lambda name, shape: (0, 0))["metrics"]


def restore(config: Config, path: Path, state: State, allow_changes: bool = False) -> list[str]:
    """Fills `state` from a checkpoint; returns notes for the user.

    Raises UserError if the configuration differs in a way that would make it another training, unless
    that is allowed; and where so many processes can't share the parts of a step.
    """
    saved = checkpoint.load(path, verified=True, wanted=state.learner.wanted())
    own = path.parent.resolve() == (config.run_dir / "checkpoints").resolve()
    before = completed(saved["config"])  # with the keys that are new since then
    differences = list(changes(before, to_mapping(config)))
    refused = "; ".join(str(change) for change in differences if not change.is_allowed)
    if refused and own and not allow_changes:
        raise UserError(
            f"{config.run_dir}: the run was started with another configuration ({refused});"
            " choose another run.name, put the values back, or allow it by --allow-changes."
        )
    if own and not allow_changes:
        check_teacher(saved, state, str(path))
    fill(saved, state, str(path))
    noted = [change for change in differences if not change.key.startswith("run.")]
    whose = "" if own else ", the state of another run: its weights, its optimizer and its step"
    begin = f"going on from {path} (step {state.step:,}){whose}"
    notes = [begin, *(f"changed: {item}" for item in noted)]
    world_size = state.learner.ranks.world_size
    if own and saved["world_size"] != world_size:
        notes.append(
            f"{counted(world_size, 'process')} now, {saved['world_size']} before: the global batch stays"
            f" {config.train.batch_size}"
        )
    return notes + (_share_parts(config, saved, state.learner) if own else [])


def restore_copy(memory: Memory, state: State) -> list[str]:
    """Fills `state` from the copy in memory; returns notes for the user."""
    saved = to_cpu(memory.state)  # the optimizer takes tensors for its own
    check_teacher(saved, state, "the copy in memory")
    fill(saved, state, "the copy in memory")
    state.learner.set_parts(saved["parts"])
    return [f"going on from the copy of the state in memory (step {state.step:,})"]


def teacher_of(state: State) -> str | None:
    """The checksum of the weights of the model that teaches this one, if one does."""
    return getattr(state.learner.task, "identity", None)


def check_teacher(saved: dict[str, Any], state: State, where: str) -> None:
    """Raises UserError if a run would go on with another teacher, or with none."""
    before, now = (str(value or "none")[:8] for value in (saved.get("teacher"), teacher_of(state)))
    if before != now:
        raise UserError(
            f"task.teacher: up to {where} the run was taught by another model (weights {before}, now {now});"
            " name the file of its teacher, choose another run.name, or allow it by --allow-changes."
        )


def fill(saved: dict[str, Any], state: State, where: str) -> None:
    """Fills `state` from a checkpoint's content. Raises UserError, naming `where`, if it does not fit."""
    state.learner.load_state_dict(saved, where)
    state.best, state.best_step = saved["best"], saved.get("best_step")
    state.best_by = saved.get("best_by") or saved["config"]["checkpoint"]["best"]
    state.metrics, state.window = saved["metrics"], saved["window"]
    state.history = {name: list(values) for name, values in saved.get("history", {}).items()}


def _share_parts(config: Config, saved: dict[str, Any], learner: Learner) -> list[str]:
    """Cuts steps into the parts of the run that goes on, or as the configuration now wants; a note on it."""
    train = config.train
    if not train.parts and train.accumulate == saved["config"]["train"]["accumulate"]:
        learner.set_parts(saved["parts"])
    if learner.parts == saved["parts"]:
        return []
    return [
        f"a step is cut into {counted(learner.parts, 'part')} now, {saved['parts']} before: from here on"
        " noise and the order of sums are others"
    ]
