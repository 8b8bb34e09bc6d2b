"""Parts of a model by name: what is sharded, or computed a second time, one at a time; and its BatchNorm."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dist_train.config import UserError, nearest


def blocks(model: nn.Module, patterns: Sequence[str], key: str) -> list[tuple[str, nn.Module]]:
    """The modules that `patterns` name, with their names, the innermost first.

    By default each child with weights of the ModuleLists and Sequentials; those inside of another are looked
    into. Raises UserError, naming the configuration's `key`, for a pattern that no module's name matches.
    """
    if patterns:
        named = {name: module for name, module in model.named_modules() if name}
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in named):
                raise UserError(
                    f"{key}: no part of the model is named like '{pattern}'{nearest(pattern, named)}."
                )
        found = [item for item in named.items() if any(fnmatchcase(item[0], p) for p in patterns)]
        return sorted(found, key=lambda item: -item[0].count("."))
    return list(_children("", model))


LISTS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


def _children(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if type(module) in LISTS and type(child) not in LISTS:
            if any(True for _ in child.parameters()):
                yield f"{prefix}{name}", child
        else:
            yield from _children(f"{prefix}{name}.", child)


def is_batchnorm(module: nn.Module) -> bool:
    """Whether it keeps running averages of what it has seen."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def recompute(model: nn.Module, wanted: bool | str, default: Sequence[str] = ()) -> None:
    """Makes blocks keep only their inputs, and compute the rest again in the backward pass.

    Chen et al., 2016. With the same noise, and without another change of buffers: no bit changes.

    Args:
        wanted: true for each block that `default` names, or patterns of names with commas in between.
    """
    patterns = wanted.replace(",", " ").split() if isinstance(wanted, str) else default
    done: list[str] = []
    for name, block in blocks(model, patterns, "parallel.recompute") if wanted else ():
        if inner := next((inner for inner in done if inner.startswith(f"{name}.")), None):
            raise UserError(
                f"parallel.recompute: {name} holds {inner}, which is computed again, too; name one of them."
            )
        done.append(name)
        again = partial(_as_before, block)
        block.forward = partial(  # type: ignore[method-assign]
            checkpoint, block.forward, use_reentrant=False, context_fn=again
        )


def _as_before(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """What is around the first computation of a block, and around the second one."""
    return nullcontext(), _unchanged(list(block.buffers()))


@contextmanager
def _unchanged(buffers: list[torch.Tensor]) -> Iterator[None]:
    """Leaves buffers as they are: BatchNorm would count a batch twice."""
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:  # also where torch leaves it early, by an exception, as soon as it has what it needs
        for buffer, value in zip(buffers, before, strict=True):
            buffer.data.copy_(value)  # autograd has seen the buffer, and should not see this
