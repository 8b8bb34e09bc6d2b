"""`dist-train sync`: gives W&B what it lacks of runs that were made offline, or cut off.

metrics.jsonl is read, not W&B's own offline files: of these each attempt has one, and steps that were done
again are in several of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dist_train.config import Config, RunError, UserError, counted, load
from dist_train.record import media
from dist_train.record.history import effective, read_lines, read_metrics, read_status
from dist_train.record.sent import by_step, summary
from dist_train.record.wandb import begin, first_line, has_key, options
from dist_train.tools.status import collect


def found(places: Sequence[Path]) -> list[Path]:
    """The folders of runs that are there, those of folders of runs too.

    Raises UserError for a run that is training: W&B would hear it twice.
    """
    rows = collect(places)
    for row in rows:
        if row["state"] == "running":
            raise UserError(f"{row['run']}: the run is training, and W&B gets its rows from itself.")
    return [Path(row["run"]) for row in rows]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """What W&B is to have of a run, of each step one row."""
    return by_step(read_metrics(folder))


def send(folder: Path, overrides: Sequence[str] = ()) -> str:
    """Sends each step that W&B lacks, and the summary; returns what was done, in a sentence.

    Args:
        overrides: `key=value` changes of the run's configuration, as wandb.project.

    Raises UserError where nobody has logged in, RunError where W&B can't be reached.
    """
    import wandb

    mode = os.environ.get("WANDB_MODE", "online")
    if mode == "disabled":
        raise UserError("WANDB_MODE=disabled: nothing can be sent.")
    if mode == "online" and not has_key(wandb):
        raise UserError("W&B knows no API key here; `wandb login` asks for one.")
    config = _config(folder, overrides)
    rows, ended = rows_of(folder), summary(folder)
    shown = {row["step"]: row["weights"] for row in effective(read_lines(folder / "histograms.jsonl"))}
    failed = read_status(folder).get("state") == "failed"
    try:
        run = wandb.init(**options(wandb, config, folder, mode))
        sent = begin(run, run.starting_step - 1)
        steps = [row for row in rows if sent.needs(row["step"])]
        for row in steps:
            sent.add(row["step"], row | media.histograms(wandb, shown.get(row["step"], {})))
        sent.flush()
        run.summary.update(ended)
        run.finish(exit_code=int(failed))
    except Exception as error:
        raise RunError(f"{folder}: W&B: {first_line(error)}; the same command goes on.") from None
    return f"{folder}: {counted(len(steps), 'step')} sent as {run.path}"


def described(folder: Path, overrides: Sequence[str] = ()) -> Iterator[str]:
    """The rows that W&B is to have, as JSON objects."""
    import json

    _config(folder, overrides)
    yield from map(json.dumps, rows_of(folder))


def _config(folder: Path, overrides: Sequence[str]) -> Config:
    """The configuration of a run. Raises UserError if it is not there.

    Code and printed lines would be those of this process, not of the run.
    """
    file = folder / "config.yaml"
    if not file.exists():
        raise UserError(f"{folder}: there is no config.yaml, which tells the run's name and project.")
    config = load([file], overrides)
    return replace(config, wandb=replace(config.wandb, code=False, console=False))
