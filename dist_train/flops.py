"""How fast a device could train a model at most: by its FLOP/s on paper, and the model's FLOPs."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from dist_train.nested import map_tensors, tensors

# FLOP/s of products of dense matrices in bf16 or fp16, and in tf32, by NVIDIA's data sheets. Of several names
# that fit, the first one counts.
PEAK = {
    "B200": (2250e12, 1125e12),
    "H200": (989e12, 494e12),
    "H100 PCIe": (756e12, 378e12),
    "H100 NVL": (835e12, 417e12),
    "H100": (989e12, 494e12),
    "A100": (312e12, 156e12),
    "L40S": (362e12, 183e12),
    "A40": (149.7e12, 74.8e12),
    "A10": (125e12, 62.5e12),
    "L4": (121e12, 60e12),
}


def peak(device: str, precision: str) -> float | None:
    """The most FLOP/s of a device of this name, or None where that isn't known.

    It isn't for fp32: of what is computed so, cuDNN computes a part in tf32.
    """
    words = set(re.split(r"[ -]", device))
    known = (flops for name, flops in PEAK.items() if words.issuperset(name.split()))
    half, tf32 = next(known, (None, None)) if "MIG" not in words else (None, None)
    return {"bf16": half, "fp16": half, "tf32": tf32}.get(precision)


def of_training(model: nn.Module, inputs: Any) -> float | None:
    """FLOPs for each of some samples in a training step, or None for a model that can't do without numbers.

    They are three times those of the forward pass, as the backward pass makes two products of each. Counted
    by torch.utils.flop_counter: products of matrices, convolutions and attention. Nothing is computed.

    Args:
        inputs: of the samples, tensors `[B, ...]` at any depth; only their shapes matter.
    """
    from torch.utils.flop_counter import FlopCounterMode

    def shape_of(tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(tensor, device="meta")

    state = dict(model.named_parameters()) | dict(model.named_buffers())
    shapes = {name: shape_of(tensor) for name, tensor in state.items()}
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            torch.func.functional_call(model, shapes, (map_tensors(shape_of, inputs),))
    except Exception:  # whatever it wants to know of tensors that have none
        return None
    return 3 * counter.get_total_flops() / len(next(tensors(inputs)))
