"""Tasks: what a model learns, and how well.

base.py            what a task is, and tasks by one value per sample
classification.py, segmentation.py, language.py  the tasks by name, one file each
check.py           a task is tried before the first step
"""

from __future__ import annotations

from dist_train.config import Config, UserError, construct, import_object, nearest
from dist_train.tasks.base import SampleTask, Task, complete, wide
from dist_train.tasks.check import check
from dist_train.tasks.classification import Classification, is_classification
from dist_train.tasks.language import Language
from dist_train.tasks.segmentation import Segmentation

__all__ = [
    "Classification",
    "Language",
    "SampleTask",
    "Segmentation",
    "Task",
    "build",
    "check",
    "complete",
    "is_classification",
    "wide",
]

TASKS = {"classification": Classification, "segmentation": Segmentation, "language": Language}


def build(config: Config) -> Task:
    """The task that the configuration names."""
    name = config.task.name
    if name in TASKS:
        return construct(TASKS[name], config.task.args, "task.args")
    if ":" not in name:
        raise UserError(
            f"task.name: there is no task '{name}'{nearest(name, TASKS)}; use {', '.join(TASKS)}, or"
            " package.module:object."
        )
    return complete(construct(import_object(name, "task.name"), config.task.args, "task.args"))
