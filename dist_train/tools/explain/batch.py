"""One batch through a network as training begins: forward, loss, backward, and one step."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from dist_train import runtime
from dist_train.config import Config, UserError
from dist_train.data import Batch
from dist_train.learner import Learner
from dist_train.nested import map_tensors, tensors
from dist_train.seeds import key, seed_device
from dist_train.tasks import is_classification
from dist_train.tools.dryrun import DryRun
from dist_train.tools.explain.flow import Flow, flow
from dist_train.tools.trace import Trace


@dataclass(frozen=True)
class Parameter:
    """A weight of the model."""

    name: str
    shape: tuple[int, ...]
    norm: float  # before the step
    gradient: float | None  # its norm; None of one that isn't trained


@dataclass(frozen=True)
class Explained:
    """What became of one batch."""

    model: str
    samples: int
    inputs: str  # shapes and types
    flow: Flow  # its modules, in the order in which they were called
    loss: float
    guess: float | None  # the loss of one who knows nothing, where there are classes
    parameters: list[Parameter]
    optimizer: str
    rate: float  # its learning rate
    after: float  # the loss of the same batch after it


def explain(config: Config, depth: int = 1) -> Explained:
    """Takes the first batch through the network that a configuration names, and leaves no run.

    Args:
        depth: modules inside of so many others are boxes: 1 for those that the model itself calls.

    Raises UserError if the job can't be trained, and on several processes.
    """
    one_part = replace(config.train, accumulate=1, parts=None)
    parallel = replace(config.parallel, recompute=False)
    config = replace(config, compile=False, train=one_part, parallel=parallel)
    ranks = runtime.start(config)
    try:
        if ranks.world_size > 1:
            raise UserError("explain: one process shows it all; start it without a launcher.")
        job = DryRun(config, ranks)
        learner = job.learner
        batch = job.fetch()
        # So that autograd follows the data from its first operation on; copies, for what works in place.
        batch = batch._replace(inputs=map_tensors(_followed, batch.inputs))
        for module in learner.model.modules():
            module.register_forward_hook(_own)
        trace = Trace(learner, lambda call: call.depth <= depth)
        norms = {name: float(weight.detach().norm()) for name, weight in learner.model.named_parameters()}
        share = job.schedule(0, {})
        done = learner.train_step(trace.parts([batch]), share, with_norm=True)
        weight, summed = done.sums[0][:2].tolist()
        for call in trace.kept:  # until here that of the losses' sum over the number of samples
            if call.gradient is not None and done.weighted:
                call.gradient *= batch.part.total / weight if weight else 0
        trained = iter(done.row_norms)
        parameters = [
            Parameter(
                name,
                tuple(value.shape),
                norms[name],
                float(next(trained).norm()) if value.requires_grad else None,
            )
            for name, value in learner.model.named_parameters()
        ]
        classes = len(job.sets.classes)
        return Explained(
            model=config.model.name,
            samples=batch.part.size,
            inputs=", ".join(f"{list(t.shape)} {str(t.dtype)[6:]}" for t in tensors(batch.inputs)),
            flow=flow(trace, depth),
            loss=summed / weight if weight else math.nan,
            guess=math.log(classes) if classes and is_classification(job.task) else None,
            parameters=parameters,
            optimizer=type(learner.optimizer).__name__,
            rate=config.optim.lr * share,
            after=_loss(learner, batch),
        )
    finally:
        runtime.stop(ranks.accelerator)


def _followed(values: torch.Tensor) -> torch.Tensor:
    return values.detach().requires_grad_().clone() if values.is_floating_point() else values


def _own(module: torch.nn.Module, given: Any, made: Any) -> Any:
    """Makes what a module gives as it was given, as dropout of nothing does, an operation of its own."""
    before = {tensor.grad_fn for tensor in tensors(given)} - {None}
    return map_tensors(lambda values: values.view_as(values) if values.grad_fn in before else values, made)


@torch.no_grad()
def _loss(learner: Learner, batch: Batch) -> float:
    """The loss of the first batch once more, with the same noise."""
    seed_device(learner.ranks.device, key(learner.config.seed, "noise", 0, batch.part.number))
    values, weights = learner.task.losses(learner.parallel.called, batch)[:2]
    if weights is None:
        weights = torch.ones_like(values)
    return float((values * weights).sum() / weights.sum())
