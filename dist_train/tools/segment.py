"""Masks that a trained segmentation model gives for image files, written as PNG files."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torchvision.transforms import v2

from dist_train.checkpoint import files
from dist_train.config import UserError
from dist_train.data.images import as_text, read_image
from dist_train.data.masks import mask_file
from dist_train.predict import for_images, image_files
from dist_train.tasks.segmentation import scores


@torch.inference_mode()
def predict_masks(
    place: str | Path,
    images: Iterable[Path],
    folder: Path,
    *,
    model: nn.Module | None = None,
    trust: bool = False,
) -> tuple[list[Path], list[str]]:
    """The masks that were written to `folder`, and a sentence for each image that can't be read.

    A mask has the name and the size of its image, or where data.eval_transform does more than Resize the
    size of what the model sees. `model` and `trust` are as for `load_model`.
    """
    model, saved, transform = for_images(place, model, trust)
    resized = all(name == "Resize" for name in transform.names)
    written: list[Path] = []
    errors: list[str] = []
    for file in image_files(images, errors):
        target = folder / f"{file.stem}.png"
        if target in written:
            raise UserError(f"--masks: two images are called {file.stem}; write their masks to two folders.")
        try:
            image = read_image(file, saved["sample_shape"][0])
            inputs = transform(image).unsqueeze(0)
        except UserError as error:
            errors.append(str(error))
            continue
        outputs = scores(model(inputs))
        if resized and outputs.shape[-2:] != image.shape[-2:]:
            outputs = v2.functional.resize(outputs, list(image.shape[-2:]), antialias=False)
        drawn = io.BytesIO()
        mask_file(outputs.argmax(1)[0].numpy().astype(np.uint8)).save(drawn, format="png")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--masks: {as_text(folder)} can't be made: {error.strerror}.") from None
        files.write_output(target, drawn.getvalue())
        written.append(target)
    return written, errors
