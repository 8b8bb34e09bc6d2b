"""Pictures of a page: images in rows with what is said of each, and a confusion matrix."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from dist_train.pages.page import Html, escape

SIDE = 128  # of a picture at most, in pixels
SHARP = 64  # up to this side pictures are kept as they are, without a loss


class Picture(NamedTuple):
    """An image with a text in two lines."""

    pixels: np.ndarray  # float [H, W] or [H, W, C], from 0 to 1
    title: str
    text: str = ""
    hint: str = ""  # is shown where the pointer rests


def gallery(title: str, pictures: Iterable[Picture], caption: str = "") -> Html:
    """Pictures side by side, as many as have room."""
    cells = "".join(
        f'<div title="{escape(one.hint)}"><img alt="" src="{source(one.pixels)}">'
        f"<b>{escape(one.title)}</b><span>{escape(one.text)}</span></div>"
        for one in pictures
    )
    inside = f'{_note(caption)}<div class="gallery">{cells}</div>'
    return Html(f"<figure><figcaption>{escape(title)}</figcaption>{inside}</figure>")


def source(pixels: np.ndarray) -> str:
    """An image as a `data:` URL, made smaller where it is large."""
    from PIL import Image

    values = (pixels * 255).round().astype(np.uint8)
    image = Image.fromarray(values).convert("RGB" if values.ndim == 3 else "L")
    sharp = max(image.size) <= SHARP
    image.thumbnail((SIDE, SIDE))
    stream = io.BytesIO()
    options: dict[str, Any] = {"format": "PNG"} if sharp else {"format": "JPEG", "quality": 85}
    image.save(stream, **options)
    encoded = base64.b64encode(stream.getvalue()).decode()
    return f"data:image/{options['format'].lower()};base64,{encoded}"


def matrix(title: str, counts: np.ndarray, names: Sequence[str], caption: str = "") -> Html:
    """A confusion matrix `[K, K]`: the stronger a cell's color, the greater its share of its row."""
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    heads = "".join(f"<th><span>{escape(name)}</span></th>" for name in names)
    rows = []
    for row, name in enumerate(names):
        cells = "".join(
            f'<td class="{"right" if row == column else "wrong"}" style="--share:{shares[row, column]:.3f}"'
            f' title="{escape(name)}, said to be {escape(names[column])}: {count:,}">{count or ""}</td>'
            for column, count in enumerate(counts[row].tolist())
        )
        rows.append(f"<tr><th>{escape(name)}</th>{cells}</tr>")
    inside = (
        f'<div class="matrix"><table><thead><tr><th></th>{heads}</tr></thead>{"".join(rows)}</table></div>'
    )
    return Html(f"<figure><figcaption>{escape(title)}</figcaption>{_note(caption)}{inside}</figure>")


def _note(caption: str) -> str:
    return f"<p>{escape(caption)}</p>" if caption else ""
