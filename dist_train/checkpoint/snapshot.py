"""A copy of the state in memory, and whether a file of it could be read back."""

from __future__ import annotations

import copy
import io
from itertools import zip_longest
from typing import Any

import torch
from torch import nn

from dist_train.rows import is_sharded

PLAIN = (int, float, bool, str, bytes, type(None))


def to_cpu(value: Any, memory: Any = None) -> Any:
    """A copy of nested dicts and lists with every tensor copied to the CPU.

    Args:
        memory: an earlier copy that nobody needs any more; its tensors are overwritten where they fit,
            since new memory costs as much as the copy itself.
    """
    copied = _to_cpu(value, memory)
    if torch.cuda.is_initialized():  # copies into page-locked memory are under way
        torch.cuda.synchronize()
    return copied


def _to_cpu(value: Any, memory: Any) -> Any:
    if isinstance(value, torch.Tensor):
        fits = isinstance(memory, torch.Tensor) and memory.dtype == value.dtype
        if not fits or memory.shape != value.shape or memory.stride() != value.stride():
            memory = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return memory.copy_(value.detach(), non_blocking=value.is_cuda)
    if isinstance(value, dict):
        known = memory if isinstance(memory, dict) else {}
        return {key: _to_cpu(item, known.get(key)) for key, item in value.items()}
    if type(value) in (list, tuple, torch.Size):
        before = list(memory)[: len(value)] if isinstance(memory, (list, tuple)) else []
        items = zip_longest(value, before)
        return type(value)(_to_cpu(item, old) for item, old in items)
    return value if type(value) in PLAIN else copy.deepcopy(value)


def unreadable(value: Any, name: str = "") -> str:
    """Which value in nested dicts and lists could not be read back from a file, and its type; or nothing.

    Reading runs no code (`weights_only=True`), so it knows tensors, plain values, and what
    torch.serialization.add_safe_globals allows.
    """
    if type(value) in (*PLAIN, torch.Tensor, nn.Parameter) or is_sharded(value):
        return ""
    is_dict = isinstance(value, dict)
    if is_dict or type(value) in (list, tuple, torch.Size):
        items = value.items() if is_dict else enumerate(value)
        found = (unreadable(item, _part(name, key, is_dict)) for key, item in items)
        if bad := next(filter(None, found), ""):
            return bad
        if not is_dict or all(type(key) in PLAIN for key in value):
            return ""
        value = dict.fromkeys(value)  # only its keys are left to look at
    try:
        file = io.BytesIO()
        torch.save(value, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception:  # whatever its own pickling raises
        kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
        what = (
            f"has keys that are no plain values: {next(iter(value))!r}" if kind == "dict" else f"is a {kind}"
        )
        return f"{name} {what}, which could not be read back; only tensors and plain values are"
    return ""


def _part(name: str, key: Any, of_dict: bool) -> str:
    if not of_dict:
        return f"{name}[{key}]"
    return f"{name}.{key}" if name else str(key)


def is_finite(value: Any) -> bool:
    """Whether a tensor holds finite numbers only; whatever else a module keeps as its state always does."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return True
    return bool(value.isfinite().all())
