"""`dist-train estimate`: what a job would take on so many processes, before a cluster is asked for them.

Model, optimizer and a forward pass are done on torch's meta device, which has shapes and no memory, so a
model of any size is estimated on any machine. The speed is measured here, or given.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from dist_train import checkpoint, data, flops, optim, runtime, tasks
from dist_train.config import Config, UserError, counted
from dist_train.data.loader import workers
from dist_train.models import pretrained
from dist_train.models.blocks import blocks
from dist_train.nested import map_tensors
from dist_train.parts import default_parts, part_size, parts_per_rank
from dist_train.tools.dryrun import DryRun
from dist_train.tools.profiler import WARM_UP, table_of
from dist_train.tools.summary import without_memory

TIMED = 5  # steps of a measurement

Memory = dict[str, int | None]  # bytes on one process, by what they hold; None: not known


@dataclass(frozen=True)
class Estimate:
    """What a job takes on a number of processes."""

    processes: int
    parameters: int
    trained: int
    part: int  # samples that a process computes at a time
    steps: int
    samples: int  # in all steps
    flops: float | None  # of the whole training; None: not known
    memory: dict[str, Memory]  # by the way in which the model is spread
    speed: float | None  # samples per second of one process


def estimate(config: Config, processes: int, speed: float | None = None, measured: bool = False) -> Estimate:
    """What the job takes on so many processes, as it would begin on them.

    Args:
        speed: samples per second of one process, if that is known.
        measured: whether to train a few steps on this machine to measure it.

    Raises UserError if the job can't be trained so.
    """
    config = pretrained.with_own_transforms(config)
    train = config.train
    parts = default_parts(train.parts, processes, train.accumulate)
    part = part_size(train.batch_size, parts, processes, train.accumulate)
    per_rank = parts_per_rank(parts, processes)
    sets = data.build(config)
    model = without_memory(config, sets).train()
    batch = data.first_batch(sets.train)
    steps, samples = _length(config, sets)
    each = flops.of_training(model, batch.inputs)
    activations = _activations(config, model, batch)
    fixed = {
        "sums of other parts": _bytes(_trained(model)) * int(math.log2(per_rank)) if train.same_bits else 0,
        "activations": None if activations is None else activations * part // batch.rows,
    }
    memory = {"DDP": replicated(config, model) | fixed}
    if processes > 1:
        memory["FSDP2"] = _sharded(config, model, memory["DDP"], processes)
    return Estimate(
        processes,
        parameters=sum(weight.numel() for weight in model.parameters()),
        trained=sum(weight.numel() for weight in _trained(model)),
        part=part,
        steps=steps,
        samples=samples,
        flops=each and each * samples,
        memory=memory,
        speed=_speed(config, part) if measured else speed,
    )


def _length(config: Config, sets: data.Data) -> tuple[int, int]:
    """The steps of the whole training, and the samples in them."""
    steps, per_epoch, size = sets.total_steps(config), sets.steps_per_epoch(config), config.train.batch_size
    epoch = min(per_epoch * size, len(sets.train))
    return steps, steps // per_epoch * epoch + min(steps % per_epoch * size, epoch)


def replicated(config: Config, model: nn.Module) -> Memory:
    """What a process holds that holds the whole model."""
    weights = _bytes(model.parameters()) + _bytes(model.buffers())
    return {
        "weights": weights,
        "gathered blocks": 0,
        "gradients": _bytes(_trained(model)),
        "optimizer": _optimizer(config, model),
        "moving average": weights if config.train.ema else 0,
        "teacher": _teacher(config),
    }


def _teacher(config: Config) -> int:
    """The bytes of the model that teaches this one, which each process holds whole."""
    if config.task.teacher is None:
        return 0
    weights = checkpoint.load_weights(checkpoint.find(config.task.teacher))
    return _bytes(value for value in weights.values() if isinstance(value, torch.Tensor))


def _sharded(config: Config, model: nn.Module, whole: Memory, processes: int) -> Memory:
    """What a process holds of a sharded model, from what it holds of a whole one.

    A block is gathered while the one before it is computed, and its gradient is whole until it is added up;
    so are the gradients of parts that wait for others. Buffers are not sharded.
    """
    shards = config.parallel.mesh[1] if config.parallel.mesh else processes
    sizes = [_bytes(block.parameters()) for _, block in blocks(model, config.parallel.wrap, "parallel.wrap")]
    rest = _bytes(model.parameters()) - sum(sizes)  # comes with the whole model, and stays
    largest = sorted(sizes)[-2:]
    gathered = (rest + sum(largest)) // (2 if config.parallel.gather == "bf16" else 1)
    buffers = _bytes(model.buffers())
    memory = whole | {"gathered blocks": gathered + max(largest, default=rest)}
    for name, kept in (("weights", buffers), ("gradients", 0), ("optimizer", 0), ("moving average", buffers)):
        if (held := whole[name]) is not None:
            memory[name] = math.ceil((held - kept) / shards) + kept if held else 0
    return memory


def _optimizer(config: Config, model: nn.Module) -> int | None:
    """The bytes of the optimizer's state after a step; None for one that can't do without numbers."""
    optimizer = optim.build(config, model)
    for weight in _trained(model):
        weight.grad = torch.empty_like(weight)
    try:
        optimizer.step()
    except (RuntimeError, NotImplementedError):
        return None
    finally:
        optimizer.zero_grad()
    held = (value for state in optimizer.state.values() for value in state.values())
    return _bytes(value for value in held if isinstance(value, torch.Tensor))


def _activations(config: Config, model: nn.Module, batch: data.Batch) -> int | None:
    """The bytes that a batch leaves in fp32 for its backward pass; None for what can't do without numbers."""
    batch = batch._replace(
        inputs=map_tensors(_shape, batch.inputs), targets=map_tensors(_shape, batch.targets)
    )
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    held: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        held[storage._cdata] = storage  # views of one memory count once
        return tensor

    try:
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            tasks.build(config).losses(model, batch)
    except UserError:
        raise
    except Exception:  # whatever a model or a task wants to know of tensors that have no numbers
        return None
    return sum(storage.nbytes() for place, storage in held.items() if place not in own)


def _speed(config: Config, part: int) -> float:
    """Samples per second that one process of this machine trains, in batches of so many."""
    train = replace(config.train, batch_size=part, parts=None, accumulate=1)
    ranks = runtime.start(config)
    try:
        if ranks.world_size > 1:
            raise UserError("--measure: start it as one process; all are taken to be as fast.")
        job = DryRun(replace(config, train=train), ranks)
        job.train(WARM_UP + workers(job.sets.train, config, ranks))
        _wait(ranks.device)
        begin, before = time.perf_counter(), job.samples
        job.train(TIMED)
        _wait(ranks.device)
        return (job.samples - before) / (time.perf_counter() - begin)
    finally:
        runtime.stop(ranks.accelerator)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [weight for weight in model.parameters() if weight.requires_grad]


def _bytes(values: Iterable[torch.Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in values)


def _shape(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, device="meta")


def show(found: Estimate) -> None:
    """Prints an estimate: facts in lines, memory as a table."""
    several = counted(found.processes, "process")
    print(f"parameters   {found.parameters:,} ({found.trained:,} trained)")
    print(f"steps        {found.steps:,} ({found.samples:,} samples)")
    print(f"at once      {counted(found.part, 'sample')} in each process")
    if found.flops:
        print(f"compute      {found.flops:.3g} FLOPs")
    if found.speed:
        hours = found.samples / found.speed / found.processes / 3600
        print(
            f"time         {hours:.3g} hours, if each of {several} trains {found.speed:,.0f} samples/s;"
            " evaluations and checkpoints come on top"
        )
    rows = table_of(f"GB on each of {several}", *found.memory)
    for name in next(iter(found.memory.values())):
        cells = [memory[name] for memory in found.memory.values()]
        if any(cell != 0 for cell in cells):
            rows.add_row(name, *("?" if cell is None else f"{cell / 1e9:.3f}" for cell in cells))
    totals = (sum(filter(None, memory.values())) for memory in found.memory.values())
    rows.add_row("together", *(f"{total / 1e9:.3f}" for total in totals))
    print()
    Console(width=100).print(rows)
