"""The model at step 0, tried on samples of both sets: what does not fit is told before a step is taken."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from dist_train import models, tasks
from dist_train.config import Config, UserError
from dist_train.data import Data, first_batch
from dist_train.meters import Best, stop_when
from dist_train.optim import rates
from dist_train.runtime import Runtime
from dist_train.seeds import seed_weights
from dist_train.tasks import Task


def first_model(config: Config, ranks: Runtime, data: Data, task: Task, model: nn.Module | None) -> nn.Module:
    """The model at step 0, on the device, tried on samples of both sets.

    Args:
        model: used instead of the one that the configuration names.

    Raises UserError for a model that can't be built, or that the samples, the task, or the metrics that the
    configuration asks for don't fit.
    """
    seed_weights(config.seed)
    if model is None:
        if not data.classes and config.task.name == "classification":
            raise UserError("data: the data set has no `classes`, so the model's outputs can't be counted.")
        model = models.build(
            config.model.name, config.model.args, data.sample_shape, max(1, len(data.classes))
        )
    names: list[str] = []
    for part, samples in (("training", data.train), ("evaluation", data.eval)):
        batch, outputs = first_batch(samples), None
        if isinstance(task, tasks.SampleTask):
            outputs = models.probe(model, batch.inputs, config.model.name).to(ranks.device)
            batch = batch.to(ranks.device)  # where the model will be, which a task of one's own may rely on
        names = tasks.check(task, model, batch, outputs, len(data.classes))
        if outputs is not None and tasks.is_classification(task) and not data.classes:
            as_outputs = replace(samples.labels, classes=outputs.shape[1])  # as many as the model has
            samples.labels = as_outputs
            samples.check_labels(part)
    best = config.checkpoint.best or task.best
    Best.parse(best).check(names)
    for rule in stop_when(config, best):
        Best(rule.metric, rule.sign).check(names, "train.stop_when")
    if config.schedule.name == "plateau":
        Best(*rates.watched(config.schedule.args)).check(names, "schedule.args.metric")
    if config.parallel.name == "ddp" or ranks.world_size == 1:  # else block by block, as it is sharded
        model.to(ranks.device)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model
