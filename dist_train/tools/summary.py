"""`dist-train summary`: the layers of a model with shapes, parameters and multiply-adds."""

from __future__ import annotations

from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dist_train import data, models
from dist_train.config import Config, UserError
from dist_train.models import freeze, pretrained


def summarize(config: Config) -> None:
    """Prints a table of the model's layers for one sample, and the totals."""
    sets = data.build(pretrained.with_own_transforms(config))
    model = without_memory(config, sets)
    with torch.device("meta"):
        dtype = torch.float32 if sets.eval.transform else torch.int64  # of images, or symbols
        rows, multiply_adds = layers(model, sets.sample_shape, dtype)
    table = Table(box=None, pad_edge=False)
    for heading in ("layer", "type", "output", "parameters"):
        table.add_column(heading, justify="right" if heading == "parameters" else "left")
    for name, kind, shape, parameters in rows:
        table.add_row(name, kind, " x ".join(map(str, shape)), f"{parameters:,}")
    # Not the terminal's width but the table's: piped output is not cut.
    Console(width=120).print(table)
    total = sum(weight.numel() for weight in model.parameters())
    trainable = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    print(f"\ninput           {' x '.join(map(str, sets.sample_shape))}")
    print(f"parameters      {total:,} ({trainable:,} trainable, {total * 4 / 2**20:,.1f} MiB in fp32)")
    print(f"multiply-adds   {multiply_adds:,} per sample")


def without_memory(config: Config, sets: data.Data) -> nn.Module:
    """The model that the configuration names, its weights on the meta device: one of any size at once.

    Those need no gradient that are frozen for the whole training.
    """
    args = {name: value for name, value in config.model.args.items() if name != "weights"}
    wanted = (config.model.name, args, sets.sample_shape, max(1, len(sets.classes)))
    with torch.device("meta"):
        try:
            model = models.build(*wanted)
        except (UserError, RuntimeError):  # RegNets compute their widths; a mistake comes up again
            with torch.device("cpu"):
                model = models.build(*wanted).to("meta")
    for name in freeze.frozen(model, config.model.freeze) if config.model.freeze_until is None else ():
        model.get_parameter(name).requires_grad_(False)
    return model


def layers(
    model: nn.Module, sample_shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> tuple[list[tuple[str, str, tuple[int, ...], int]], int]:
    """(name, type, output shape without batch, own parameters) of each leaf layer, and the multiply-adds.

    Multiply-adds are half of what torch.utils.flop_counter counts: products of matrices and convolutions.
    """
    rows: list[tuple[str, str, tuple[int, ...], int]] = []

    def record(name: str, module: nn.Module) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            shape = tuple(output.shape[1:]) if isinstance(output, torch.Tensor) else ()
            count = sum(weight.numel() for weight in module.parameters())
            rows.append((name, type(module).__name__, shape, count))

        return hook

    handles = [
        module.register_forward_hook(record(name or type(module).__name__, module))
        for name, module in model.named_modules()
        if not any(module.children())
    ]
    model.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, *sample_shape, dtype=dtype))
    for handle in handles:
        handle.remove()
    return rows, counter.get_total_flops() // 2
