"""BatchNorm by the statistics of the whole global batch, which ranks compute together (SyncBatchNorm).

torch's own takes no CPU, and counts also the sample that stands in for an empty part of a short batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dist_train.config import UserError, counted
from dist_train.models.blocks import is_batchnorm

Sum = Callable[[torch.Tensor], torch.Tensor]  # of a small tensor, over all ranks, in their order


class Counting:
    """Whether what this rank computes now has samples of its own; layers share it."""

    now = True


def check(parts: int, world_size: int) -> None:
    """Raises UserError where ranks compute parts of a step one after the other."""
    if parts != world_size:
        raise UserError(
            f"model.sync_batchnorm: a step has {counted(parts, 'part')} for {counted(world_size, 'process')},"
            " but statistics of all parts need each in a process of its own, at once; start"
            f" {counted(parts, 'process')}, or set train.accumulate=1 and train.parts={world_size}."
        )


def synchronize(model: nn.Module, add: Sum) -> Counting:
    """Makes the BatchNorm layers of a model in training normalize by the values of all ranks.

    Raises UserError for layers that do more than to normalize.
    """
    counting = Counting()
    for name, layer in model.named_modules():
        if not is_batchnorm(layer):
            continue
        if type(layer).forward is not nn.modules.batchnorm._BatchNorm.forward:
            raise UserError(
                f"model.sync_batchnorm: {name} is a {type(layer).__name__}, which does more than normalize;"
                " it works for torch's BatchNorm layers alone."
            )
        layer.forward = Synchronized(layer, counting, add)  # type: ignore[assignment]
    return counting


class Synchronized:
    """What a BatchNorm layer does instead of its own `forward`."""

    def __init__(self, layer: nn.Module, counting: Counting, add: Sum) -> None:
        self.layer, self.counting, self.add, self.plain = layer, counting, add, layer.forward

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """`[B, C, ...]` normalized; in training by mean and variance over all ranks, which it averages."""
        layer: Any = self.layer
        if not layer.training:
            return self.plain(inputs)  # type: ignore[no-any-return]
        layer._check_input_dim(inputs)
        wide = inputs.float()
        others = [dim for dim in range(inputs.ndim) if dim != 1]
        shape = [1, -1, *(1 for _ in others[1:])]
        counts = float(self.counting.now)
        own = inputs.numel() / inputs.shape[1] * counts
        # Two passes: the variance as the mean of squares less the square of the mean would lose its digits.
        first = torch.cat([wide.sum(others) * counts, wide.new_full((1,), own)])
        summed = _Sum.apply(first, self.add)
        count = summed[-1].detach()
        mean = summed[:-1] / count
        centered = wide - mean.view(shape)
        variance = _Sum.apply(centered.square().sum(others) * counts, self.add) / count
        outputs = centered * torch.rsqrt(variance + layer.eps).view(shape)
        if layer.affine:
            outputs = outputs * layer.weight.view(shape) + layer.bias.view(shape)
        if layer.track_running_stats:
            _average(layer, mean.detach(), (variance * count / (count - 1).clamp(min=1)).detach())
        return outputs.to(inputs.dtype)


class _Sum(torch.autograd.Function):
    """The sum over all ranks, whose gradient is the sum of all ranks' gradients."""

    @staticmethod
    def forward(context: Any, values: torch.Tensor, add: Sum) -> torch.Tensor:
        context.add = add
        return add(values)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return context.add(gradients[0].contiguous()), None


@torch.no_grad()
def _average(layer: Any, mean: torch.Tensor, variance: torch.Tensor) -> None:
    """Moves a layer's running averages, as torch does."""
    layer.num_batches_tracked.add_(1)
    share = layer.momentum
    if share is None:  # the mean of all batches so far
        share = 1 / float(layer.num_batches_tracked)
    layer.running_mean.lerp_(mean.to(layer.running_mean.dtype), share)
    layer.running_var.lerp_(variance.to(layer.running_var.dtype), share)
