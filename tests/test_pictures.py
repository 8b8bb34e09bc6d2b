"""Pictures of samples, and of a network: what is drawn, and what it says."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dist_train import load
from dist_train.config import UserError
from dist_train.data.images import InMemory
from dist_train.tools import pictures, samples
from dist_train.tools.explain import Explained, draw, explain, show
from tests.test_data import config
from tests.worlds import SMALL, listing


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
    assert [float(image.mean()) for image in pictures.visible(row)] == [0.0, 0.25, 1.0, 0.25]


def test_images_of_any_number_of_channels_and_titles_in_any_letters_are_drawn(tmp_path: Path) -> None:
    row = [(torch.rand(channels, 4, 4), f"{channels} $ \\ 🧀 Käse") for channels in (1, 2, 3, 4, 5)]
    pictures.write_grid([row], tmp_path / "five.png")
    assert np.asarray(Image.open(tmp_path / "five.png").convert("L")).std() > 20
    with pytest.raises(UserError, match=r"only images \[C, H, W\] can be drawn, not samples of shape \[4\]"):
        pictures.write_grid([[(torch.rand(4), "")]], tmp_path / "none.png")


def links(explained: Explained) -> set[tuple[str, str]]:
    """Who follows whom in a network, by the names that stand in the boxes."""
    return {(before.title, after.title) for before, after in explained.flow.edges}


def test_a_batch_is_explained_by_the_numbers_of_autograd_and_leaves_nothing(
    npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [*SMALL, "model.args.hidden=[5]", "train.accumulate=2"]
    before = listing(tmp_path)
    explained = explain(load([], words))
    assert listing(tmp_path) == before
    names = ["the batch", "0", "1", "2", "3", "the loss"]
    assert links(explained) == set(pairwise(names))
    flatten, first, relu, last = explained.flow.modules
    assert [call.statistics.shape for call in (flatten, first, relu, last) if call.statistics] == [
        (16, 64), (16, 5), (16, 5), (16, 3)]  # fmt: skip
    # By the chain rule: the gradient by a bias is the sum over samples of that by what its layer gives.
    norms = {parameter.name: parameter.gradient or 0 for parameter in explained.parameters}
    assert list(norms) == ["1.weight", "1.bias", "3.weight", "3.bias"] and min(norms.values()) > 0
    assert last.gradient and norms["3.bias"] <= 4 * last.gradient  # Cauchy-Schwarz, of 16 samples
    assert explained.guess == pytest.approx(np.log(3))
    assert explained.after < explained.loss < 2
    show(explained)
    out = capsys.readouterr().out
    assert "the batch: 16 samples, [16, 1, 8, 8] float32" in out
    assert "3.bias" in out and f"{norms['3.bias']:.3g}" in out
    draw(explained, tmp_path / "network.png")
    assert np.asarray(Image.open(tmp_path / "network.png").convert("L")).std() > 20


def test_blocks_are_opened_by_depth_and_what_goes_around_them_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("abcdefgh" * 40)
    words = ["data.name=text", "data.root=text.txt", "data.eval_fraction=0.2", "data.args.context=8",
             "model.name=gpt", "task.name=language", "train.batch_size=4", "train.steps=2", "data.workers=0",
             "device=cpu", "model.args={depth: 2, heads: 2, width: 8, dropout: 0.0}"]  # fmt: skip
    whole = explain(load([], words))
    assert [call.kind for call in whole.flow.modules] == [
        "Embedding", "Embedding", "Dropout", "Block", "Block", "LayerNorm"]  # fmt: skip
    assert {("the batch", "symbols"), ("symbols", "+"), ("positions", "+"), ("+", "dropout"),
            ("dropout", "blocks.0"), ("blocks.0", "blocks.1")} < links(whole)  # fmt: skip
    inside = explain(load([], words), depth=2)
    assert {("blocks.0.attention", "attention"), ("blocks.0.expanded", "gelu"), ("dropout", "blocks.0.norm"),
            ("dropout", "+"), ("blocks.0.dropout", "+"), ("matrix product", "the loss"),
            } < links(inside)  # fmt: skip
    draw(inside, tmp_path / "gpt.png")
    assert np.asarray(Image.open(tmp_path / "gpt.png").convert("L")).std() > 20
