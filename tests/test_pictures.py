"""Pictures of samples: what is drawn, and what stands above it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dist_train.config import UserError
from dist_train.data.images import InMemory
from dist_train.tools import pictures, samples
from tests.test_data import config


def drawn(monkeypatch: pytest.MonkeyPatch, source: Any, **sections: Any) -> list[list[Any]]:
    """The rows of (image, title) that `samples` hands on for a data set."""
    rows: list[list[Any]] = []
    setup, build = config(**sections), samples.data.build
    monkeypatch.setattr(samples.data, "build", lambda config: build(config, source, source))
    monkeypatch.setattr(samples, "write_grid", lambda given, output: rows.extend(given))
    samples.draw(setup, Path("unused.png"))
    return rows


def test_mean_and_deviation_are_undone_and_no_image_is_stretched(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.full((3, 1, 4, 4), 100, dtype=torch.uint8)
    images[1] = 101
    normalized = {"mean": [0.5], "std": [0.2], "shuffle": False}
    read, seen = drawn(monkeypatch, InMemory(images, torch.arange(3), ["a", "b", "$c"]), data=normalized)
    for (before, _), (after, _) in zip(read, seen, strict=True):
        assert torch.allclose(before, after, atol=1e-6)
        assert 100 / 255 - 0.001 < float(before.mean()) < 101 / 255 + 0.001
    assert [title for _, title in read] == ["a", "b", "$c"]
    assert {title for _, title in seen} == {"as the model sees it"}  # nothing is augmented here


@pytest.mark.parametrize(
    ("label", "title"),
    [(0.123456, "0.1235"), (torch.tensor(2.5), "2.5"), (torch.zeros(2, 3), "[2, 3]"), (7, "7")],
)
def test_what_is_no_classification_is_drawn_too(
    label: Any, title: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = drawn(monkeypatch, [(torch.zeros(1, 4, 4), label)] * 2, task={"name": "mine:Task"})
    assert [text for _, text in rows[0]] == [title] * 2


def test_values_beyond_white_are_scaled_alike_in_a_row() -> None:
    row = [(torch.full((1, 2, 2), value), "") for value in (-1.0, 0.0, 3.0, float("nan"))]
    assert [float(image.mean()) for image in pictures._visible(row)] == [0.0, 0.25, 1.0, 0.25]


def test_images_of_any_number_of_channels_and_titles_in_any_letters_are_drawn(tmp_path: Path) -> None:
    row = [(torch.rand(channels, 4, 4), f"{channels} $ \\ 🧀 Käse") for channels in (1, 2, 3, 4, 5)]
    pictures.write_grid([row], tmp_path / "five.png")
    assert np.asarray(Image.open(tmp_path / "five.png").convert("L")).std() > 20
    with pytest.raises(UserError, match=r"only images \[C, H, W\] can be drawn, not samples of shape \[4\]"):
        pictures.write_grid([[(torch.rand(4), "")]], tmp_path / "none.png")
