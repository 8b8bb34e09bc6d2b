"""A PNG with a grid of images, each under its title."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from dist_train.config import UserError


def write_grid(rows: Sequence[Sequence[tuple[torch.Tensor, str]]], output: Path) -> None:
    """Draws rows of (image `[C, H, W]`, title). Raises UserError if the file can't be written."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = max(map(len, rows))
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(1.5 * columns, 1.7 * len(rows)), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.axis("off")
    for line, pictures in zip(axes, rows, strict=True):
        for axis, (image, title) in zip(line, pictures, strict=False):
            shown = _unscale(image.nan_to_num()).permute(1, 2, 0).clamp(0, 1).squeeze(-1)
            axis.imshow(shown.numpy(), cmap="gray" if shown.ndim == 2 else None)
            axis.set_title(title, fontsize=8)
    try:
        figure.savefig(output, format="png", dpi=120)
    except OSError as error:
        raise UserError(f"--output: {output} can't be written: {error.strerror}.") from None
    finally:
        plt.close(figure)


def _unscale(image: torch.Tensor) -> torch.Tensor:
    """Each image's own values from 0 to 1, so that a normalized one can be seen."""
    low, high = image.min(), image.max()
    return image if low >= 0 and high <= 1 else (image - low) / (high - low).clamp(min=1e-8)
