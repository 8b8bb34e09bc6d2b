"""Distillation: a model learns also from what a trained one, its teacher, says of the same images."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

from dist_train import checkpoint
from dist_train.config import Config, UserError, completed, from_file, to_mapping
from dist_train.data import Batch, Data
from dist_train.runtime import Runtime
from dist_train.tasks import Classification, Task, is_classification
from dist_train.tasks.base import Losses, each_loss
from dist_train.trained import trained

SEEN = ("mean", "std", "eval_transform", "cache_size")  # of `data`: how images become what a model sees


class Distilled(Classification):
    """A classification whose loss is shared with a teacher (Hinton et al., 2015).

    (1 - weight) x the task's own loss + weight x T^2 x KL(teacher || student) of their probabilities at
    temperature T. Both see the same pixels, also mixed ones (Beyer et al., 2022). Evaluation is the task's.

    Args:
        own: the task without a teacher.
        teacher: frozen, in evaluation mode, on the device.
        identity: of the teacher's weights, for checkpoints.
    """

    def __init__(
        self, own: Classification, teacher: nn.Module, identity: str, weight: float, temperature: float
    ) -> None:
        self.own, self.best, self.teacher, self.identity = own, own.best, teacher, identity
        self.loss, self.weight, self.temperature = own.loss, weight, temperature  # type: ignore[method-assign]

    def losses(self, model: nn.Module, batch: Batch) -> Losses:
        """The shared loss of each sample, `[B]`, and the teacher's part of it as `train/distillation`."""
        outputs = model(batch.inputs)
        values = each_loss(self.own, outputs, batch.targets, batch.rows)
        with torch.no_grad():
            taught = self.teacher(batch.inputs)
        if outputs.shape != taught.shape:
            raise UserError(
                f"task.teacher: it gives {taught.shape[1]} scores for an image, the model {outputs.shape[1]};"
                " both must have as many."
            )
        student, teacher = (x.float().div(self.temperature).log_softmax(1) for x in (outputs, taught))
        each = nn.functional.kl_div(student, teacher, reduction="none", log_target=True).sum(1)
        each = each * self.temperature**2
        return (1 - self.weight) * values + self.weight * each, None, {"distillation": each.detach()}


def taught(config: Config, task: Task, ranks: Runtime, data: Data) -> tuple[Task, list[str]]:
    """`task` with the teacher that the configuration names, if it does, and a note on it.

    The teacher is the evaluated model of a run's best checkpoint. Its file may name a model of one's own only
    where the configuration, which is trusted, names the same. Raises UserError if it does not see images
    as this run does, or names other classes.
    """
    place, wanted = config.task.teacher, config.task
    if place is None:
        return task, []
    if not isinstance(task, Classification) or not is_classification(task):
        raise UserError("task.teacher: only classification learns from a teacher; leave it out.")
    if wanted.teacher_weight > 1:
        raise UserError(
            f"task.teacher_weight: a share of the loss, from 0 to 1, not {wanted.teacher_weight:g}."
        )
    path = checkpoint.find(place)
    saved = checkpoint.load(path, verified=True)
    named = completed(saved["config"])["model"]["name"]
    vouched = [f"model.name={named}"] if named == config.model.name else []
    known = from_file(saved["config"], path, vouched, needed=["model."])
    teacher = trained(path, saved, known, None, trust=False)
    _check(config, data, saved, str(path))
    teacher.requires_grad_(False).to(ranks.device)
    if config.channels_last:
        teacher.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    identity = _checksum(teacher)
    called = ranks.accelerator.prepare_model(teacher, evaluation_mode=True)
    note = (
        f"taught by {named} of {path} (step {saved['step']:,}, weights {identity[:8]}): weight"
        f" {wanted.teacher_weight:g}, temperature {wanted.temperature:g}"
    )
    return Distilled(task, called, identity, wanted.teacher_weight, wanted.temperature), [note]


def _check(config: Config, data: Data, saved: dict[str, Any], where: str) -> None:
    """Raises UserError where the teacher would see other images, or mean other classes by its outputs."""
    ours, theirs = to_mapping(config)["data"], completed(saved["config"])["data"]
    for key in SEEN:
        if ours[key] != theirs[key]:
            raise UserError(
                f"task.teacher: {where} was trained with data.{key}={theirs[key]}, here it is {ours[key]};"
                " a teacher must see images as its student does."
            )
    if list(saved["sample_shape"]) != list(data.sample_shape):
        raise UserError(
            f"task.teacher: {where} takes images of shape {saved['sample_shape']}, those here have"
            f" {list(data.sample_shape)}."
        )
    if list(saved["classes"]) != list(map(str, data.classes)):
        raise UserError(f"task.teacher: the classes of {where} are not those of this data set.")


def _checksum(model: nn.Module) -> str:
    """SHA-256 of a model's weights and buffers, with their names."""
    sha = hashlib.sha256()
    for name, value in model.state_dict().items():
        if not isinstance(value, torch.Tensor):  # what get_extra_state gives
            continue
        sha.update(name.encode())
        sha.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
