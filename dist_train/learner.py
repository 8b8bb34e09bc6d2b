"""What learns: a model with its optimizer, its moving average and its task. No files, no clocks.

Build, spread over ranks, make the optimizer, then restore, in this order. `train_step` is the arithmetic of
one optimizer step; the same bits come out for any number of processes that can share its parts.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from dist_train import flops, optim
from dist_train.checkpoint.sharded import Wanted
from dist_train.config import Config, Every, UserError, to_mapping
from dist_train.data import Batch, Data, Feed, first_batch
from dist_train.evaluate import Unread, evaluate
from dist_train.first import first_model
from dist_train.models import batchnorm
from dist_train.models.freeze import Frozen, frozen_for_good
from dist_train.models.weights import Weights, fill
from dist_train.parallel import Parallel, spread
from dist_train.parts import default_parts, parts_per_rank
from dist_train.rows import rows_of
from dist_train.runtime import Runtime
from dist_train.seeds import key, seed_device
from dist_train.tasks import Task
from dist_train.tree import tree_sum

MOMENT = re.compile(r"optimizer/state/(\d+)/")  # how saved tensors of the optimizer are named


class Step(NamedTuple):
    """What an optimizer step leaves, still on the device."""

    names: tuple[str, ...]  # of the values that are recorded: `loss`, and the task's further ones
    sums: list[torch.Tensor]  # of each of this rank's parts: [sum of weights, weighted sum of each value]
    losses: list[tuple[torch.Tensor, torch.Tensor | None]]  # of each of these parts: values, and weights
    norm: torch.Tensor | None  # of the gradient, before clipping, where it was needed or asked for
    row_norms: list[torch.Tensor]  # of each trained weight's gradient, then, too
    skipped: bool
    weighted: bool  # whether the task weighs its values


class Learner:
    """A model in training, on all ranks, which must all make it.

    The initial weights are a function of the seed. Raises UserError for a model or optimizer that can't be
    built, or that the samples don't fit; and for a task that doesn't fit to the model's outputs and the
    targets, or lacks the metric of the best.

    Args:
        model: used instead of the one that the configuration names.
        weights: to begin with, on rank 0; all ranks get them.
    """

    def __init__(
        self,
        config: Config,
        ranks: Runtime,
        data: Data,
        task: Task,
        model: nn.Module | None = None,
        weights: Weights | None = None,
    ) -> None:
        self.config, self.ranks, self.task = config, ranks, task
        self.step = 0  # optimizer steps done
        self._share = 1.0  # of its own learning rate, which each group of weights got in the last one
        self.skipped = 0  # of these, whose update was dropped because it was not finite
        self.set_parts(default_parts(config.train.parts, ranks.world_size, config.train.accumulate))
        with ranks.together():
            self.model = first_model(config, ranks, data, task, model)
            self.begins = fill(self.model, weights, max(1, len(data.classes))) if weights else ""
            self.frozen = Frozen(self.model, config.model.freeze, _until(config, data))
        self.most_per_second = _most_per_second(self.model, data, config, ranks)
        self.average = copy.deepcopy(self.model).requires_grad_(False) if config.train.ema else None
        self.parallel = spread(config, ranks, self.model)
        if self.average is not None:
            self.average = self.parallel.follow(self.average)
        with ranks.together():
            self.optimizer = optim.build(config, self.model)
            self.parallel.check(self.optimizer)
        # Torch's own optimizers and ours draw nothing, and drop gradients as we do: a seed, and the profiling
        # of `zero_grad`, cost a hundredth of a small step each.
        self.is_foreign = not type(self.optimizer).__module__.startswith(("torch.", "dist_train."))
        # Accelerate's wrapper costs a tenth of a small step (docs/design.md); only a loss scale needs it.
        self.scaler = ranks.accelerator.scaler
        self._stepping = (
            ranks.accelerator.prepare_optimizer(self.optimizer) if self.scaler else self.optimizer
        )
        self.backward = ranks.accelerator.backward if self.scaler else torch.Tensor.backward
        self._move_average: Callable[[int], None] | None = None
        if self.average is not None:
            self._move_average = optim.average_updater(self.average, self.model, config.train.ema)
        self._trained = _names_of_trained(self.model)
        self.model.train()
        # Of a model that ranks compute together each one computes as many batches as the others.
        self._filler: Batch | None = None
        if self.parallel.is_collective:
            self._filler = first_batch(data.eval).to(ranks.device, config.channels_last)

    @property
    def evaluated(self) -> nn.Module:
        """The model that is evaluated and exported: the moving average where there is one."""
        return self.model if self.average is None else self.average

    def set_parts(self, parts: int) -> None:
        """Cuts global batches into so many parts. Raises UserError if the ranks can't share them evenly."""
        self.per_rank = parts_per_rank(parts, self.ranks.world_size)
        if self.config.model.sync_batchnorm:
            batchnorm.check(parts, self.ranks.world_size)
        self.parts = parts

    def train_step(self, batches: Iterable[Batch], share: float, with_norm: bool = False) -> Step:
        """Takes one optimizer step on this rank's parts of the global batch.

        Args:
            batches: the parts, on the device, each asked for after the one before it is computed.
            share: of its own learning rate that each group of weights gets.
            with_norm: whether to compute the norm of the gradient also where nothing needs it.
        """
        train, skipping = self.config.train, self.config.on_nonfinite == "skip"
        self._share = share
        if self.frozen.set(self.step):
            self.parallel.spread_anew()
            self._trained = _names_of_trained(self.model)
        optim.scale_lr(self.optimizer, share)
        self.parallel.buffers.begin(self.parts, skipping)
        sums: list[torch.Tensor] = []
        losses: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        total, weighted = 1, False
        further: dict[str, torch.Tensor] = {}
        for batch in batches:
            part, total = batch.part, batch.part.total
            # Keyed by the part, not by the rank: whoever computes it drops the same units.
            seed_device(self.ranks.device, key(self.config.seed, "noise", self.step, part.number))
            is_last = len(sums) == self.per_rank - 1
            with self.parallel.part(bool(part.size), is_last):
                given = self.task.losses(self.parallel.called, batch)
                values, weights = given[0], given[1]
                weighted, further = weights is not None, given[2] if len(given) > 2 else {}
                scale = self.parallel.share / total
                if weights is None and not further and part.size:  # the same in fewer operations
                    gradient = torch.full_like(values, scale)
                    summed = torch.stack([values.new_full((), part.size), values.detach().sum()])
                else:
                    gradient, summed = _weigh(values, weights, further, part.size)
                    gradient = gradient * scale
                sums.append(summed)
                if weighted and is_last:  # beside the backward pass
                    weigh = self.ranks.sum_soon(tree_sum(sums)[:1])
                if skipping:  # a loss that is not finite on one rank makes the gradient so on all of them
                    gradient = gradient + 0 * values.detach().sum()
                self.backward(values, gradient=gradient)
            losses.append((values.detach(), weights))
        self.parallel.buffers.finish(min(self.parts, total))
        if weighted:  # until here divided by the number of samples; now all know what the values weigh
            every = weigh()[0]
            self.parallel.scale(torch.where(every > 0, total / every, 0))
        norm, rows, skipped = None, [], False
        if self.scaler and (train.clip_norm or train.clip_value or skipping or with_norm):
            self.ranks.accelerator.unscale_gradients(self._stepping)
        if train.clip_norm or skipping or with_norm:
            rows = self.parallel.row_norms()
            norm = torch.linalg.vector_norm(torch.cat(rows))
            if train.clip_norm:
                self.parallel.clip(norm, train.clip_norm)
            skipped = skipping and not norm.isfinite()  # the same on all ranks
        if train.clip_value:
            self.parallel.clip_values(train.clip_value)
        if not skipped or self.scaler:  # the scaler skips by itself, and lowers its scale
            if self.is_foreign:  # the same random numbers on all ranks
                seed_device(self.ranks.device, key(self.config.seed, "update", self.step))
            self._stepping.step()
        if self.is_foreign:
            self.optimizer.zero_grad()
        else:
            for weight in self._optimized():
                weight.grad = None
        if skipped:
            self.parallel.buffers.undo()
            self.skipped += 1
        elif self._move_average:
            self._move_average(self.step)
        self.step += 1
        return Step(("loss", *further), sums, losses, norm, rows, skipped, weighted)

    def rates(self) -> dict[str, float]:
        """The learning rate of the last step; and those of groups of weights, where there are several."""
        own = list(dict.fromkeys(group["initial_lr"] for group in self.optimizer.param_groups))
        several = own if len(own) > 1 else []
        rates = {f"lr/{number}": rate * self._share for number, rate in enumerate(several)}
        return {"lr": self.config.optim.lr * self._share} | rates

    def evaluate(
        self, batches: Iterable[Batch], stop: Callable[[], bool], task: Task | None = None
    ) -> tuple[dict[str, float], Unread]:
        """The metrics of the evaluated model over all ranks' batches: see `evaluate.evaluate`.

        Args:
            task: used instead of the one that is trained.
        """
        moved = Feed(iter(batches), self.ranks.device, self.config.channels_last)
        metrics = evaluate(self.evaluated, moved, task or self.task, self.ranks, stop, self._filler)
        self.parallel.evaluated(self.evaluated)
        return metrics

    def weights(self) -> dict[str, Any]:
        """The state of the evaluated model, whole on rank 0. All ranks come here together."""
        return dict(self.parallel.whole(self.evaluated.state_dict()))

    def state_dict(self) -> dict[str, Any]:
        """All that changes in it, by the names of the model: whole on rank 0, or as it is spread.

        All ranks come here together. Raises UserError where the model itself has changed what is trained.
        """
        if changed := self._trained ^ _names_of_trained(self.model):
            raise UserError(
                f"model: it has changed by itself whether {min(changed)} is trained (requires_grad), of which"
                " a run that goes on would not know; use model.freeze and model.freeze_until instead."
            )
        state = {
            "step": self.step,
            "skipped": self.skipped,
            "parts": self.parts,
            "model": self.model.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else None,
        }
        return state if self.config.checkpoint.sharded else dict(self.parallel.whole(state))

    def wanted(self) -> Wanted:
        """Which rows this rank holds of each tensor of a saved state, as `sharded.load` asks for them."""
        like = {f"model/{name}": value for name, value in self.model.state_dict().items()}
        if self.average is not None:
            like |= {f"average/{name}": value for name, value in self.average.state_dict().items()}
        weights = self._optimized()

        def rows(name: str, shape: torch.Size) -> tuple[int, int]:
            tensor = like.get(name)
            if (number := MOMENT.match(name)) and int(number[1]) < len(weights):
                tensor = weights[int(number[1])]
            if not isinstance(tensor, torch.Tensor) or tensor.shape != shape:
                tensor = torch.empty(shape, device="meta")  # all of it
            return rows_of(tensor)

        return rows

    def _optimized(self) -> list[torch.Tensor]:
        """The weights in the order in which the optimizer numbers them."""
        return [weight for group in self.optimizer.param_groups for weight in group["params"]]

    def load_state_dict(self, saved: dict[str, Any], where: str) -> None:
        """Takes over what `state_dict` gave. Raises UserError, naming `where`, if it does not fit.

        Args:
            saved: a checkpoint, whose configuration tells which of the optimizer's arguments are others now.
        """
        try:
            _fill(self.parallel, self.model, saved["model"])
            if self.average is not None:
                _fill(self.parallel, self.average, saved["average"] or saved["model"])
            weights = self._optimized()
            moments = {
                number: self.parallel.shares(values, dict.fromkeys(values, weights[number]))
                for number, values in saved["optimizer"]["state"].items()
            }
            sections = saved["config"], to_mapping(self.config)
            # The optimizer knows its weights by their numbers: it would give one the state of another.
            old, new = (frozen_for_good(self.model, section["model"]) for section in sections)
            if old != new:
                raise ValueError("model.freeze leaves other weights to the optimizer now")
            before, now = (section["optim"] for section in sections)
            optim.restore(self.optimizer, saved["optimizer"] | {"state": moments}, before, now)
        except (RuntimeError, ValueError, IndexError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{where}: does not fit the model of this configuration: {reason}") from None
        if self.scaler and saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])
        self.step, self.skipped = saved["step"], saved.get("skipped", 0)


def _names_of_trained(model: nn.Module) -> set[str]:
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


def _fill(parallel: Parallel, module: nn.Module, values: dict[str, Any]) -> None:
    module.load_state_dict(parallel.shares(values, module.state_dict()))


def _weigh(
    values: torch.Tensor, weights: torch.Tensor | None, further: dict[str, torch.Tensor], size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What each value of a part weighs, and the sums `[weights, weighted loss, weighted further values]`.

    A part without samples of its own, `size` 0, has one that weighs nothing.
    """
    counts = float(size > 0)
    weights = torch.full_like(values, counts) if weights is None else weights.to(values.dtype) * counts
    columns = [weights, *((value.detach() * weights) for value in (values, *further.values()))]
    return weights, torch.stack([column.sum() for column in columns])


def _until(config: Config, data: Data) -> int | None:
    """The step from which on frozen weights are trained, if there is one."""
    until = config.model.freeze_until
    return None if until is None else Every.parse(until).in_steps(data.steps_per_epoch(config))


def _most_per_second(model: nn.Module, data: Data, config: Config, ranks: Runtime) -> float | None:
    """How many samples all devices could train at their peak, or None where that isn't known."""
    peak = flops.peak(ranks.device_name, config.precision)
    count = flops.of_training(model, first_batch(data.train).inputs) if peak else None
    return ranks.world_size * peak / count if peak and count else None
