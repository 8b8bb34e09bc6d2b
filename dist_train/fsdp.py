"""Models that are sharded over ranks (FSDP2): each rank holds some rows of each weight and of its state.

`fully_shard` is called here, not by Accelerate, whose plugin does nothing on CPUs. The gradient is added up
in the same tree as under DDP (parallel.py), so the bits are the same, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from dist_train.config import Config, UserError, counted
from dist_train.models.blocks import blocks, is_batchnorm
from dist_train.parallel import Parallel, compile_module, row_norms
from dist_train.rows import local, rows_of
from dist_train.runtime import Runtime
from dist_train.tree import Subtrees, tree_sum


class Sharded(Parallel):
    """A model of which each rank holds a shard; all ranks must make it."""

    is_collective = True

    def __init__(self, config: Config, ranks: Runtime, model: nn.Module) -> None:
        self._mesh = _mesh(config.parallel.mesh, ranks)
        self._sums: list[TreeReduceScatter] = []
        super().__init__(config, ranks, model)

    def _spread(self) -> nn.Module:
        for key, value, bad in (
            ("precision", self.config.precision, "fp16"),
            ("channels_last", self.config.channels_last, True),
        ):
            if value == bad:
                raise UserError(f"{key}: {value} does not work with parallel.name=fsdp.")
        if self.config.parallel.gather == "bf16" and self.config.precision != "bf16":
            raise UserError("parallel.gather: bf16 is for precision=bf16.")
        if self.in_order and not hasattr(FSDPModule, "set_custom_reduce_scatter"):
            raise UserError(
                f"parallel.name: torch {torch.__version__} can't add up the gradients of a sharded model in a"
                " fixed order; use a newer one, or train.same_bits=false."
            )
        called = self._shard(self.model)
        for module in self.model.modules():
            if isinstance(module, FSDPModule) and self.in_order:
                module.set_gradient_divide_factor(1.0)
                self._sums.append(TreeReduceScatter())
                module.set_custom_reduce_scatter(self._sums[-1])  # type: ignore[arg-type]
        return called

    def _shard(self, model: nn.Module) -> nn.Module:
        """Gives all ranks rank 0's weights, of which each keeps its rows; returns what is called."""
        wanted = self.config.parallel
        options: dict[str, Any] = {"mesh": self._mesh}
        if wanted.offload:
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=self.ranks.device.type == "cuda")
        if wanted.gather == "bf16":
            for module in filter(
                is_batchnorm, model.modules()
            ):  # its averages, and so its weights, stay fp32
                self._shard_one(module, options)
            options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        called = self.ranks.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
        for _, block in blocks(model, wanted.wrap, "parallel.wrap"):
            if isinstance(block, FSDPModule):
                continue
            if self.config.compile:
                compile_module(block, self.config.compile_args)
            self._shard_one(block, options)
        self._shard_one(model, options)
        return called

    def _shard_one(self, module: nn.Module, options: dict[str, Any]) -> None:
        self._settle(module)
        try:
            fully_shard(module, **options)
        except (ValueError, NotImplementedError) as error:  # a weight without dimensions, say
            reason = " ".join(str(error).split())
            raise UserError(f"parallel.name: fsdp can't shard this model: {reason}") from None

    def _settle(self, module: nn.Module) -> None:
        """Moves what is not sharded yet to the device, with rank 0's values."""
        for tensor in (*module.parameters(), *module.buffers()):
            if not isinstance(tensor, DTensor):
                tensor.data = tensor.data.to(self.ranks.device)
                dist.broadcast(tensor.data, src=0)

    def follow(self, average: nn.Module) -> nn.Module:
        """Shards a copy of the model in the same way."""
        self._shard(average)
        pairs = zip(average.state_dict().values(), self.model.state_dict().values(), strict=True)
        for new, old in pairs:
            if isinstance(new, torch.Tensor):
                local(new).copy_(local(old))
        return average

    @contextmanager
    def part(self, counts: bool, is_last: bool) -> Iterator[None]:
        """As for any model; each block adds up its own gradient."""
        self.counting.now = counts
        for each in self._sums:
            each.is_last = is_last
        yield
        self.buffers.after_part(counts, is_last)
        if is_last and any(len(each.subtrees) for each in self._sums):
            raise UserError("parallel.name: fsdp needs each part of a step to use the same weights; use ddp.")

    def scale(self, factor: torch.Tensor) -> None:
        """Multiplies this rank's rows of all gradients by a number."""
        gradients = self.gradients()
        for device in {gradient.device for gradient in gradients}:
            torch._foreach_mul_([g for g in gradients if g.device == device], factor.to(device))

    def row_norms(self) -> list[torch.Tensor]:
        """The norm of each row of the whole gradient, on all ranks."""
        sizes = [1 if weight.grad is None else max(1, _rows(weight)) for weight in self.weights]
        norms = torch.zeros(sum(sizes), device=self.ranks.device)
        for weight, place in zip(self.weights, norms.split(sizes), strict=True):
            if weight.grad is not None:
                first, count = rows_of(weight)
                place[first : first + count] = row_norms(local(weight.grad))
        dist.all_reduce(norms, group=self._mesh.get_group("shard"))  # each row is on one rank, else 0
        return list(norms.split(sizes))

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        """Raises UserError for an optimizer that can't step on sharded weights; tries it on a small one."""
        smallest = min(self.weights, key=lambda weight: (-min(weight.ndim, 2), weight.numel()))
        trial = nn.Parameter(torch.zeros_like(smallest))
        try:
            other = type(optimizer)([trial], **optimizer.defaults)
        except TypeError:  # one of its own making
            return
        trial.grad = torch.ones_like(trial)
        try:
            other.step()
        except (NotImplementedError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"optim.name: {type(optimizer).__name__} does not work with parallel.name=fsdp: {reason}"
            ) from None

    def evaluated(self, model: nn.Module) -> None:
        """After an evaluation: the outermost module would keep its weights, and not see them change."""
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def shares(self, values: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
        """This rank's rows of saved `values`, each spread as the tensor in `like` of its name."""
        return {name: _share(value, like.get(name)) for name, value in values.items()}

    def whole(self, state: Any) -> Any:
        """`state` with each sharded tensor put together, on the CPU of rank 0; of no use on other ranks."""
        if isinstance(state, DTensor):
            full = state.full_tensor()
            return full.cpu() if self.ranks.is_main else None
        if isinstance(state, dict):
            return {key: self.whole(value) for key, value in state.items()}
        return [self.whole(value) for value in state] if isinstance(state, list) else state


class TreeReduceScatter:
    """How the gradient of one block is added up over ranks and parts, in place of FSDP's reduce-scatter.

    This rank's parts are merged as they come; in the last one each rank adds up, in the order of ranks, all
    ranks' sums for its own shard.
    """

    def __init__(self) -> None:
        self.is_last = True
        self.subtrees = Subtrees()

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Memory for what is added up, and for the sum."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: torch.Tensor,
        input_tensor: torch.Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> None:
        """Adds a part `[ranks x N]`; in the last one the sum `[N]` of this rank's shard is the output."""
        if not self.is_last:
            self.subtrees.add([input_tensor])
            output_tensor.fill_(-0.0)  # whatever is added to it later keeps its bits
            return
        (total,) = self.subtrees.close([input_tensor])
        assert total is not None
        shards = torch.empty_like(total)
        dist.all_to_all_single(shards, total, group=group)
        output_tensor.copy_(tree_sum(shards.chunk(group.size())))


def _share(value: Any, like: Any) -> Any:
    """This rank's rows of a whole tensor, or those that it has read already, as a tensor like `like`."""
    if not isinstance(like, DTensor) or not isinstance(value, torch.Tensor):
        return value
    first, count = rows_of(like)
    mine = value[first : first + count] if value.shape == like.shape else value
    if mine.shape != like.to_local().shape:
        return value  # a number for the whole tensor, or none that fits
    mine = mine.to(like.to_local().device)
    return DTensor.from_local(
        mine.contiguous(), like.device_mesh, like.placements, run_check=False, shape=like.shape,
        stride=like.stride(),
    )  # fmt: skip


def _rows(weight: torch.Tensor) -> int:
    return weight.shape[0] if weight.ndim else 1


def _mesh(wanted: Sequence[int], ranks: Runtime) -> DeviceMesh:
    """All ranks in one row, or in `wanted` [replicas, shards]. Raises UserError if these are not all."""
    replicas, shards = wanted or (1, ranks.world_size)
    if replicas * shards != ranks.world_size or shards < 2:
        raise UserError(
            f"parallel.mesh: {replicas} replicas of {shards} shards are not"
            f" {counted(ranks.world_size, 'process')}, of which two must share a model at least."
        )
    kind = ranks.device.type
    if replicas == 1:
        return init_device_mesh(kind, (shards,), mesh_dim_names=("shard",))
    return init_device_mesh(kind, (replicas, shards), mesh_dim_names=("replicate", "shard"))
