"""How a model is spread over ranks: the only place that knows DDP, and where the parts of a step become one.

A global batch is cut into P parts, whatever the number of processes; a rank computes P / world size of them,
one after the other. What parts give, gradients and buffers, is added up in one fixed tree over their numbers
(tree.py): a rank merges its own subtree, and ranks add up theirs in the same order. So the bits depend on
neither how many processes compute a step, nor how DDP fills its buckets. The idea is that of EasyScale (Li
et al., SC'23).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dist_train.buffers import Buffers
from dist_train.config import Config, UserError, construct
from dist_train.models.batchnorm import Counting, synchronize
from dist_train.models.blocks import recompute
from dist_train.rows import local
from dist_train.runtime import Runtime
from dist_train.shared import Shared, share
from dist_train.tree import Subtrees, Tensors, add, sum_over_ranks


class Parallel:
    """A model on all ranks, which must all make it: they get rank 0's weights.

    Args:
        model: on its device; its names are those of the state.
    """

    is_collective = False  # whether a rank can't compute the model without the others

    def __init__(self, config: Config, ranks: Runtime, model: nn.Module) -> None:
        self.config, self.ranks, self.model = config, ranks, model
        self.in_order = config.train.same_bits
        self.counting = Counting()
        if config.model.sync_batchnorm and ranks.world_size > 1:
            if config.compile:
                raise UserError(
                    "compile: true does not work with model.sync_batchnorm; leave one of them out."
                )
            self.counting = synchronize(model, ranks.sum)
        recompute(model, config.parallel.recompute, config.parallel.wrap)
        self.meeting: list[Callable[[], None]] = []  # told when a rank begins to wait for others
        self.called = self._spread()
        self.weights = [weight for weight in model.parameters() if weight.requires_grad]
        self._subtrees = Subtrees()
        self.buffers = Buffers(ranks, model)
        self.is_ddp = isinstance(self.called, DistributedDataParallel)
        self._shared = share(ranks) if self.is_ddp and self.in_order else None
        self._add_in_order()

    def _spread(self) -> nn.Module:
        """Spreads the model over all ranks; returns what a step calls."""
        # One call wraps the model: autocast, and DDP where there are several ranks.
        called: nn.Module = self.ranks.accelerator.prepare_model(self.model)
        if self.config.compile:
            compile_module(self.model, self.config.compile_args)
        return called

    def _add_in_order(self) -> None:
        """Makes DDP, if it is there, leave buffers alone and add up gradients in the order of parts."""
        if not self.is_ddp:
            return
        self.called.broadcast_buffers = False  # type: ignore[assignment] # after rank 0's at the start
        if self.in_order:
            buckets = BucketSum(
                self.weights, self._subtrees, self.ranks.world_size, self.meeting, self._shared
            )
            # DDP refuses annotations that are texts, so it gets a function without any.
            self.called.register_comm_hook(buckets, lambda hook, bucket: hook(bucket))  # type: ignore[operator]

    def spread_anew(self) -> None:
        """To be called when other weights need a gradient than before: DDP must know which ones do."""
        if not isinstance(self.called, DistributedDataParallel):
            return
        place = self.called.device_ids, self.called.output_device
        handler = self.ranks.accelerator.ddp_handler
        self.called = self.model  # the old DDP takes its hooks off the weights as it goes
        # Not by Accelerate, which would put other tensors in place of those that the average follows.
        self.called = DistributedDataParallel(self.model, *place, **handler.to_kwargs())
        self._add_in_order()

    def follow(self, average: nn.Module) -> nn.Module:
        """A moving average, from a copy of the model, which begins with the model's weights."""
        average.load_state_dict(self.model.state_dict())  # rank 0's
        prepared: nn.Module = self.ranks.accelerator.prepare_model(average, evaluation_mode=True)
        return prepared

    @property
    def share(self) -> float:
        """By what a loss is multiplied so that gradients add up: DDP's own sum is a mean over ranks."""
        return 1.0 if self.in_order else float(self.ranks.world_size)

    @contextmanager
    def part(self, counts: bool, is_last: bool) -> Iterator[None]:
        """Within it the forward and backward pass of one part are done; ranks meet in the last one.

        Args:
            counts: whether the part has samples of its own.
            is_last: whether it is this rank's last part of the step.
        """
        self.counting.now = counts
        with self.ranks.accelerator.no_sync(self.called) if self.is_ddp and not is_last else nullcontext():
            yield
        self.buffers.after_part(counts, is_last)
        if not self.in_order:
            return
        if is_last and (self.is_ddp or not len(self._subtrees)):
            self._subtrees.clear()  # the communication hook has added them
            return
        gradients: Tensors = [weight.grad for weight in self.weights]
        if is_last:
            gradients = self._subtrees.close(gradients)
        else:
            self._subtrees.add(gradients)
            gradients = [None] * len(gradients)
        for weight, gradient in zip(self.weights, gradients, strict=True):
            weight.grad = gradient

    def gradients(self) -> list[torch.Tensor]:
        """What this rank holds of each gradient, in its memory."""
        return [local(weight.grad) for weight in self.weights if weight.grad is not None]

    def scale(self, factor: torch.Tensor) -> None:
        """Multiplies all gradients by a number on the device."""
        torch._foreach_mul_(self.gradients(), factor)

    def row_norms(self) -> list[torch.Tensor]:
        """Of each trained weight the norm of each row `[R]` of its gradient, from which follow all others.

        A row lies on one rank, however a model is sharded, so they are the same for all ways to spread it.
        """
        zero = torch.zeros(1, device=self.ranks.device)
        return [zero if weight.grad is None else row_norms(weight.grad) for weight in self.weights]

    def clip(self, norm: torch.Tensor, most: float) -> None:
        """Scales a gradient of this norm to one of `most`, if it is greater."""
        self.scale(torch.clamp(most / (norm + 1e-6), max=1.0))

    def clip_values(self, most: float) -> None:
        """Brings each number of the gradient between -`most` and `most`."""
        if gradients := self.gradients():
            torch._foreach_clamp_min_(gradients, -most)
            torch._foreach_clamp_max_(gradients, most)

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        """Raises UserError for an optimizer that does not work with a model that is spread so."""

    def forget(self) -> None:
        """Drops what the parts of a step have given that did not come to its end."""
        self._subtrees.clear()

    def evaluated(self, model: nn.Module) -> None:
        """To be called after an evaluation of the model, or of its average."""

    def shares(self, values: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
        """What this rank holds of saved `values`, each spread as the tensor in `like` of its name."""
        return values

    def whole(self, state: Any) -> Any:
        """`state` as one file holds it, on rank 0; of no use on other ranks, which must all come here."""
        return state


def compile_module(module: nn.Module, args: dict[str, Any]) -> None:
    """Compiles what a module computes, with arguments of torch.compile. Raises UserError for wrong ones."""
    for name in {"model", "disable"} & set(args):
        raise UserError(
            f"compile_args.{name}: not yours to set; `compile` says whether the model is compiled."
        )
    # Without `dynamic` the second size of a batch makes code for all sizes, which adds up in another order;
    # which size that is depends on where this attempt began.
    args = {"dynamic": False} | args
    construct(torch.compile, args, "compile_args", (TypeError, ValueError, RuntimeError), model=nn.Identity())
    module.compile(**args)


def spread(config: Config, ranks: Runtime, model: nn.Module) -> Parallel:
    """A model on all ranks, as the configuration wants it. Raises UserError if that is impossible."""
    if config.parallel.name == "fsdp" and ranks.world_size > 1:
        from dist_train.fsdp import Sharded  # takes a second to import

        return Sharded(config, ranks, model)
    return Parallel(config, ranks, model)


class BucketSum:
    """A communication hook of DDP: adds up this rank's subtrees in a bucket of gradients, then all ranks'.

    It doesn't know the model's wrapper: DDP would outlive a run in a circle, and its threads with it.
    """

    def __init__(
        self,
        weights: list[nn.Parameter],
        subtrees: Subtrees,
        world_size: int,
        meeting: list[Callable[[], None]],
        shared: Shared | None,
    ) -> None:
        self.meeting, self.shared = meeting, shared
        self.numbers: dict[torch.Tensor, int] = {weight: number for number, weight in enumerate(weights)}
        self.subtrees, self.world_size = subtrees, world_size
        self._side: torch.cuda.Stream | None = None
        self._waiting: list[tuple[torch.Tensor, torch.futures.Future[torch.Tensor]]] = []

    def __call__(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """The sum over all parts of what a bucket holds."""
        numbers = [self.numbers[weight] for weight in bucket.parameters()]
        for subtree in self.subtrees.smallest_first():
            add([subtree[number] for number in numbers], bucket.gradients())
        if self.shared:
            return self._with_the_last(bucket, self.shared)
        if bucket.index() == 0:
            self._tell()
        flat = bucket.buffer()
        if self.world_size == 2:  # of two numbers there is one sum, in any order
            return dist.all_reduce(flat, async_op=True).get_future().then(lambda done: done.value()[0])
        future: torch.futures.Future[torch.Tensor]
        if not flat.is_cuda:  # at once: a thread beside the backward pass gains less than its noise
            future = torch.futures.Future()
            future.set_result(sum_over_ranks(flat, self.world_size))
            return future
        # In a stream of its own, so that the backward pass goes on meanwhile; the future knows the stream.
        self._side = self._side or torch.cuda.Stream(flat.device)
        self._side.wait_stream(torch.cuda.current_stream(flat.device))
        flat.record_stream(self._side)
        future = torch.futures.Future(devices=[flat.device])
        with torch.cuda.stream(self._side):
            future.set_result(sum_over_ranks(flat, self.world_size))
        return future

    def _with_the_last(self, bucket: dist.GradBucket, shared: Shared) -> torch.futures.Future[torch.Tensor]:
        """The sum of a bucket, begun when the step's last one is there: so ranks wait for each other once."""
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        self._waiting.append((bucket.buffer(), future))
        if bucket.is_last():
            self._tell()
            shared.add(flat for flat, _ in self._waiting)
            for flat, its_own in self._waiting:
                its_own.set_result(flat)
            self._waiting.clear()
        return future

    def _tell(self) -> None:
        for tell in self.meeting:
            tell()


def row_norms(gradient: torch.Tensor) -> torch.Tensor:
    """The norm of each row of a gradient `[R, ...]`."""
    if gradient.ndim < 2:
        return gradient.abs().flatten()
    return torch.linalg.vector_norm(gradient.flatten(1), dim=1)
