"""Muon: momentum whose matrices are made orthogonal, for hidden layers; another optimizer for the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from dist_train.rows import is_sharded


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) for the matrices of hidden layers, with the optimizer of all other weights.

    A matrix `[O, I]` follows not its momentum, but nearly the nearest matrix with orthogonal rows or columns;
    a convolution `[O, I, ...]` is a matrix of O rows. What else there is, embeddings, the last layer, biases,
    is stepped by `rest`: in a configuration `{name: {argument: value}}`, AdamW if none is named, at the same
    rate unless `lr` is among its arguments.

    Args:
        matrices: weights of two and more dimensions, or groups of them.
        lr: the length of a step; times sqrt(rows / columns) where there are more rows.
        momentum: Nesterov's.
        weight_decay: decoupled, as in AdamW.
        ns_steps: iterations that make a matrix orthogonal.
        rest: the optimizer of the other weights; its groups follow the one of the matrices.
    """

    def __init__(
        self,
        matrices: Sequence[Any],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        ns_steps: int = 5,
        rest: torch.optim.Optimizer | None = None,
    ) -> None:
        options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "ns_steps": ns_steps}
        super().__init__(matrices or [{"params": []}], options)
        self.rest, self.own = rest, len(self.param_groups)
        if rest:
            self.param_groups += rest.param_groups

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Moves all weights that have a gradient. Raises NotImplementedError for matrices in shards."""
        for group in self.param_groups[: self.own]:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._move(weight, weight.grad, group)
        if self.rest:  # which keeps its groups and its state here, where they are saved and restored
            self.rest.param_groups, self.rest.state = self.param_groups[self.own :], self.state
            self.rest.step()

    def _move(self, weight: nn.Parameter, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        if is_sharded(weight):
            raise NotImplementedError("Muon needs whole matrices")
        state, lr = self.state[weight], group["lr"]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        momentum = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        matrix = gradient.lerp(momentum, group["momentum"]).flatten(1)
        direction = orthogonal(matrix, group["ns_steps"]).view(weight.shape)
        length = lr * max(1, matrix.shape[0] / matrix.shape[1]) ** 0.5
        weight.mul_(1 - lr * group["weight_decay"]).add_(direction, alpha=-length)


def orthogonal(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """`[R, C]` with singular values between about 0.7 and 1.2, and the singular vectors of `matrix`.

    By Newton and Schulz: an odd polynomial of the matrix, whose coefficients (Jordan et al., 2024) bring even
    small singular values up in few steps.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trained weights that are matrices of hidden layers, and all others.

    Those of embeddings, which are tables, and of the last layer, which makes the outputs, are none.
    """
    tables = {
        id(w) for module in model.modules() if isinstance(module, nn.Embedding) for w in module.parameters()
    }
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    matrices = [weight for weight in trained if weight.ndim > 1 and id(weight) not in tables][:-1]
    chosen = {id(weight) for weight in matrices}
    return matrices, [weight for weight in trained if id(weight) not in chosen]
