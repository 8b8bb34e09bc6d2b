"""What happens inside a model during a step: what each module gives, and who made a number that isn't finite.

Hooks see what modules are given and give, and what the operations that autograd has recorded make of their
gradients. Nothing that is computed changes by it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from dist_train.data import Batch
from dist_train.learner import Learner
from dist_train.models.blocks import is_batchnorm
from dist_train.nested import tensors

LOSS = "the loss"  # what stands for a module's name where the task computes


@dataclass(frozen=True)
class Statistics:
    """Of some numbers: those of the finite ones among them. They add up."""

    shape: tuple[int, ...] = ()  # of the last tensor
    count: int = 0  # of the finite ones
    total: float = 0.0
    squares: float = 0.0
    low: float = math.inf
    high: float = -math.inf
    zeros: int = 0
    broken: int = 0  # that are not finite

    @classmethod
    def of(cls, values: torch.Tensor) -> Statistics:
        """Those of a tensor."""
        wide = values.detach().flatten().to("cpu", torch.float64)
        finite = wide[wide.isfinite()]
        return cls(
            shape=tuple(values.shape),
            count=len(finite),
            total=float(finite.sum()),
            squares=float(finite.square().sum()),
            low=float(finite.min()) if len(finite) else math.inf,
            high=float(finite.max()) if len(finite) else -math.inf,
            zeros=int((finite == 0).sum()),
            broken=len(wide) - len(finite),
        )

    def __add__(self, later: Statistics) -> Statistics:
        return Statistics(
            shape=later.shape,
            count=self.count + later.count,
            total=self.total + later.total,
            squares=self.squares + later.squares,
            low=min(self.low, later.low),
            high=max(self.high, later.high),
            zeros=self.zeros + later.zeros,
            broken=self.broken + later.broken,
        )

    @property
    def mean(self) -> float:
        """The mean; NaN of none."""
        return self.total / self.count if self.count else math.nan

    @property
    def std(self) -> float:
        """The standard deviation (of all, not of a sample of them); NaN of none."""
        return max(0.0, self.squares / self.count - self.mean**2) ** 0.5 if self.count else math.nan


@dataclass(eq=False)
class Call:
    """One call of a module, in the order in which they begin."""

    name: str
    kind: str  # the module's type
    module: nn.Module | None
    outer: Call | None = None  # that of the module around it
    bad_rows: list[int] | None = None  # those of its inputs that are not finite, if some are not
    nodes: list[Any] = field(default_factory=list)  # the operations that made its inputs
    takes_batch: bool = False  # as it is
    statistics: Statistics | None = None  # of what it gave, where that is wanted
    gradient: float | None = None  # the norm of the loss's gradient by that

    @property
    def depth(self) -> int:
        """How many modules are around it: 0 of the model."""
        return 0 if self.outer is None else self.outer.depth + 1


@dataclass(frozen=True)
class Fault:
    """Where the first number of a part was made that is not finite, and by what."""

    phase: str  # forward or backward
    module: str  # its name: "" of the model itself, LOSS of the task
    kind: str
    cause: str  # input, weight or computation
    what: str  # the weights' names; the operation, in the backward pass
    part: int
    rows: tuple[int, ...]  # of the part whose numbers are not finite; () where that is not known


class Trace:
    """Follows a model, and a loss, through the parts of one step.

    Args:
        learner: whose `train_step` is to be given `parts(batches)`.
        wanted: of which calls to take the statistics of what they give.
    """

    def __init__(self, learner: Learner, wanted: Callable[[Call], bool]) -> None:
        self.wanted = wanted
        self.faults: list[Fault] = []
        self.kept: list[Call] = []  # those that were wanted, over all parts
        self.calls: list[Call] = []  # of the last part
        self.owners: dict[Any, Call] = {}  # of the last part: the innermost call that made each operation
        self.outputs: dict[int, torch.Tensor] = {}  # of each part, where the model gives [B, K]
        self._stack: list[Call] = []
        self._is_forward = False
        self._backward = learner.backward
        learner.backward = self._at_the_loss
        task = getattr(learner.task, "given", learner.task)
        self.loss = Call(LOSS, type(task).__name__, None)
        for name, module in learner.model.named_modules():
            module.register_forward_pre_hook(partial(self._enter, name), with_kwargs=True)
            module.register_forward_hook(partial(self._leave, name))

    def parts(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The parts of a step, each followed from when it is asked for."""
        for batch in batches:
            self.batch, self._is_forward, self._found = batch, True, len(self.faults)
            self.calls.clear()
            self.owners.clear()
            self._stack.clear()
            yield batch
        self._is_forward = False

    @property
    def _is_over(self) -> bool:
        """Whether the part's first number that is not finite is known."""
        return len(self.faults) > self._found

    def _enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._is_forward:  # computed a second time, in the backward pass
            return
        given = list(tensors([args, kwargs]))
        outer = self._stack[-1] if self._stack else None
        call = Call(name, type(module).__name__, module, outer)
        call.nodes = [tensor.grad_fn for tensor in given if tensor.grad_fn is not None]
        batch = {id(tensor) for tensor in tensors(self.batch.inputs)}
        call.takes_batch = any(id(tensor) in batch for tensor in given)
        if any(map(_is_broken, given)):
            call.bad_rows = self._rows(given)
        if outer is not None:
            self._claim(outer, call.nodes)
            # It was made in between: inner modules gave finite numbers, and so was what this one was given.
            if call.bad_rows is not None and outer.bad_rows is None:
                self._blame(outer, given)
        self._stack.append(call)
        self.calls.append(call)

    def _leave(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if not self._is_forward:
            return
        call, given = self._stack.pop(), list(tensors(output))
        self._claim(call, [tensor.grad_fn for tensor in given])
        if any(map(_is_broken, given)):
            self._blame(call, given)
        if call.outer is None:
            self.loss.nodes = [tensor.grad_fn for tensor in given if tensor.grad_fn is not None]
            if len(given) == 1 and given[0].ndim == 2:
                self.outputs[self.batch.part.number] = given[0].detach().float()
        floats = [tensor for tensor in given if tensor.is_floating_point()]
        if floats and self.wanted(call):
            call.statistics = Statistics.of(floats[0])
            self.kept.append(call)
            if floats[0].requires_grad:
                floats[0].register_hook(partial(_keep_norm, call))

    def _at_the_loss(self, values: torch.Tensor, gradient: torch.Tensor) -> None:
        """The backward pass, from the losses of a part."""
        self._is_forward = False
        self._claim(self.loss, [values.grad_fn])
        targets = list(tensors(self.batch.targets))
        if any(map(_is_broken, targets)):
            self.loss.bad_rows = self._rows(targets)
        if not values.isfinite().all():
            self._blame(self.loss, [values])
        self._backward(values, gradient=gradient)

    def _claim(self, call: Call, nodes: Iterable[Any]) -> None:
        """Gives a call the operations that led to `nodes`, if they are not yet another's."""
        waiting = list(nodes)
        while waiting:
            node = waiting.pop()
            if node is None or node in self.owners:
                continue
            self.owners[node] = call
            node.register_hook(partial(self._check_gradients, call, node))
            waiting += [before for before, _ in node.next_functions]

    def _check_gradients(self, call: Call, node: Any, made: Any, given: Any) -> None:
        """Called when an operation has made gradients of those it was given."""
        if self._is_over or all(map(_is_finite, made)) or not all(map(_is_finite, given)):
            return
        places = zip(made, node.next_functions, strict=False)
        inputs = [grad for grad, (before, _) in places if grad is not None and not _is_weight(before)]
        operation = node.name().removesuffix("0").removesuffix("Backward").lower()
        self._find("backward", call, "computation", operation, self._rows(inputs))

    def _blame(self, call: Call, broken: list[torch.Tensor]) -> None:
        """What was at fault when a call gave numbers that are not finite."""
        if self._is_over:
            return
        if call.bad_rows is not None:
            what = "targets" if call is self.loss else ""
            self._find("forward", call, "input", what, call.bad_rows)
        elif names := _broken_weights(call.name, call.module):
            self._find("forward", call, "weight", ", ".join(names), [])
        else:
            self._find("forward", call, "computation", "", self._rows(broken))

    def _find(self, phase: str, call: Call, cause: str, what: str, rows: list[int]) -> None:
        part = self.batch.part.number
        self.faults.append(Fault(phase, call.name, call.kind, cause, what, part, tuple(rows)))

    def _rows(self, values: Iterable[torch.Tensor]) -> list[int]:
        """The samples of this part among whose numbers are some that are not finite."""
        count, size = self.batch.rows, self.batch.part.size
        rows: set[int] = set()
        for tensor in values:
            if tensor.ndim and len(tensor) == count and not _is_finite(tensor):
                bad = ~tensor.detach().isfinite().reshape(count, -1).all(1)
                rows |= set(bad[:size].nonzero().flatten().tolist())
        return sorted(rows)


def _keep_norm(call: Call, gradient: torch.Tensor) -> None:
    call.gradient = float(torch.linalg.vector_norm(gradient.float()))


def _is_finite(values: Any) -> bool:
    if not isinstance(values, torch.Tensor) or values.layout != torch.strided:
        return True
    return bool(values.detach().isfinite().all())


def _is_broken(values: torch.Tensor) -> bool:
    """Whether some numbers are not finite; those of masks, which have no gradient, may be minus infinity."""
    if values.requires_grad or not values.is_floating_point():
        return not _is_finite(values)
    return bool((values.isnan() | values.isposinf()).any())


def _is_weight(node: Any) -> bool:
    """Whether a gradient goes to a weight, perhaps transposed, and not to what was computed."""
    while node is not None and node.name() == "TBackward0":
        node = node.next_functions[0][0]
    return node is not None and node.name().endswith("AccumulateGrad")


def _broken_weights(prefix: str, module: nn.Module | None) -> list[str]:
    """The weights of a module that are not finite; buffers that hold a NaN, where they are computed with."""
    if module is None:
        return []
    found = [name for name, weight in module.named_parameters() if not _is_finite(weight)]
    for path, part in module.named_modules():
        if not (is_batchnorm(part) and part.training):
            names = [name for name, buffer in part.named_buffers(recurse=False) if buffer.isnan().any()]
            found += [f"{path}.{name}" if path else name for name in names]
    return [f"{prefix}.{name}" if prefix else name for name in found]
