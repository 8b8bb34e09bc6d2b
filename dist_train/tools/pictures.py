"""A PNG with a grid of images, each under its title."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from dist_train.checkpoint.files import write_output
from dist_train.config import UserError

Cell = tuple[torch.Tensor, str]  # an image [C, H, W] and its title


def write_grid(rows: Sequence[Sequence[Cell]], output: Path) -> None:
    """Draws rows of (image `[C, H, W]`, title). Values are from 0 to 1; a row that goes beyond is scaled.

    Raises UserError for what is no image, and if the file can't be written.
    """
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
        for axis, image, (_, title) in zip(line, _visible(pictures), pictures, strict=False):
            axis.imshow(image.numpy(), cmap="gray" if image.ndim == 2 else None, vmin=0, vmax=1)
            axis.set_title(title, fontsize=8, parse_math=False)
    drawn = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of a title in other letters than the font's
        figure.savefig(drawn, format="png", dpi=120)
    plt.close(figure)
    write_output(output, drawn.getvalue())


def _visible(cells: Sequence[Cell]) -> list[torch.Tensor]:
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
