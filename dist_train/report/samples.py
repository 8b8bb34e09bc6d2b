"""`dist-train samples`: a picture of training images with class names, before and after augmentation."""

from __future__ import annotations

from pathlib import Path

import torch

from dist_train import data
from dist_train.config import Config, UserError
from dist_train.data.transforms import ImageTransform


def draw(config: Config, output: Path, count: int = 16) -> None:
    """Writes a PNG with the first `count` samples of the first epoch, as read and as the model sees them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sets = data.build(config)
    indices = sets.sampler(config, 0, 1, 0, 1).order(0)[:count].tolist()
    plain = ImageTransform()
    columns = min(8, len(indices))
    rows = -(-len(indices) // columns)
    figure, axes = plt.subplots(
        2 * rows, columns, figsize=(1.5 * columns, 3.4 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.axis("off")
    for place, index in enumerate(indices):
        row, column = divmod(place, columns)
        image, label = sets.train.source[index]
        seen, _ = sets.train.sample(index, epoch=0)
        name = sets.classes[int(label)] if sets.classes else f"{label}"
        for offset, (picture, title) in enumerate(((plain(image), name), (_unscale(seen), "augmented"))):
            axis = axes[2 * row + offset][column]
            shown = picture.permute(1, 2, 0).clamp(0, 1).squeeze(-1)
            axis.imshow(shown.numpy(), cmap="gray" if shown.ndim == 2 else None)
            axis.set_title(title, fontsize=8, color="black" if offset == 0 else "gray")
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
