"""PNG files: a grid of images, each under its title, and a confusion matrix."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_train.checkpoint.files import write_output
from dist_train.config import UserError

Cell = tuple[torch.Tensor, str]  # an image [C, H, W] and its title
MOST_NAMES, MOST_NUMBERS = 100, 30  # classes of a confusion matrix that still have room


def write_grid(rows: Sequence[Sequence[Cell]], output: Path) -> None:
    """Draws rows of (image `[C, H, W]`, title). Values are from 0 to 1; a row that goes beyond is scaled.

    Those that are not finite are magenta. Raises UserError for what is no image, and if it can't be written.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = max(map(len, rows))
    lines = max(title.count("\n") for row in rows for _, title in row)  # besides the first one
    size = (1.5 * columns, (1.6 + 0.15 * lines) * len(rows))
    figure, axes = plt.subplots(len(rows), columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for line, pictures in zip(axes, rows, strict=True):
        for axis, image, (given, title) in zip(line, visible(pictures), pictures, strict=False):
            axis.imshow(image.numpy(), cmap="gray" if image.ndim == 2 else None, vmin=0, vmax=1)
            broken = ~given.isfinite().all(0)
            if broken.any():
                axis.imshow((broken[..., None] * torch.tensor([1.0, 0.0, 1.0, 1.0])).numpy())
            axis.set_title(title, fontsize=8, parse_math=False)
    write_output(output, _png(figure))


def confusion(counts: np.ndarray, names: Sequence[str]) -> bytes:
    """A PNG of how many samples of each class (row) are said to be of each (column), `[K, K]`.

    The darker a cell, the greater the share of its row; of up to 30 classes the numbers are written.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    classes, shares = len(names), counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = min(16, max(4, 0.45 * classes + 1.5))
    figure, axis = plt.subplots(figsize=(size, size), layout="constrained")
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axis.set_xlabel("said to be")
    axis.set_ylabel("class")
    if classes <= MOST_NAMES:
        axis.set_xticks(range(classes), names, rotation=90, fontsize=8, parse_math=False)
        axis.set_yticks(range(classes), names, fontsize=8, parse_math=False)
    for row, column in np.argwhere(counts) if classes <= MOST_NUMBERS else ():
        color = "white" if shares[row, column] > 0.5 else "black"
        axis.text(column, row, counts[row, column], ha="center", va="center", fontsize=7, color=color)
    return _png(figure)


def _png(figure: Any) -> bytes:
    """A figure of matplotlib as PNG."""
    import matplotlib.pyplot as plt

    drawn = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of a title in other letters than the font's
        figure.savefig(drawn, format="png", dpi=120)
    plt.close(figure)
    return drawn.getvalue()


def visible(cells: Sequence[Cell]) -> list[torch.Tensor]:
    """The images as `[H, W]` or `[H, W, C]` from 0 to 1, by one scale: so they can be compared."""
    images = [image.nan_to_num(0, 0, 0) for image, _ in cells]
    for image in images:
        if image.ndim != 3:
            raise UserError(
                f"data: only images [C, H, W] can be drawn, not samples of shape {list(image.shape)}."
            )
    low, high = (extreme(torch.stack([extreme(i) for i in images])) for extreme in (torch.min, torch.max))
    if low >= -0.01 and high <= 1.01:  # rounding
        low, high = torch.tensor(0.0), torch.tensor(1.0)
    scaled = [((image - low) / (high - low).clamp(min=1e-8)).clamp(0, 1) for image in images]
    # Of channels that are no colours, the first one.
    return [(i if len(i) in (1, 3, 4) else i[:1]).permute(1, 2, 0).squeeze(-1) for i in scaled]
