"""What a model says of each sample: what follows from it, and what `eval --save` writes."""

from __future__ import annotations

import csv
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dist_train import fit, load, outcomes
from dist_train.config import UserError
from dist_train.data import Batch
from dist_train.data.images import read_image
from dist_train.data.order import Part
from dist_train.predict import load_model
from dist_train.tasks import Classification, Segmentation
from dist_train.tools import evaluation
from tests.processes import Finished
from tests.worlds import write_csv, write_images

# --- numbers ---------------------------------------------------------------------------------------


def test_each_class_has_its_figures_also_one_without_samples_and_one_that_is_never_said() -> None:
    label, predicted = np.array([0, 0, 0, 2, 2, 1]), np.array([0, 0, 2, 2, 0, 0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = outcomes.by_class(label, predicted, classes=4)
    assert rows.samples.tolist() == [3, 1, 2, 0] and rows.predicted.tolist() == [4, 0, 2, 0]
    np.testing.assert_allclose(rows.recall, [2 / 3, 0, 1 / 2, np.nan])
    np.testing.assert_allclose(rows.precision, [2 / 4, np.nan, 1 / 2, np.nan])
    np.testing.assert_allclose(rows.f1, [4 / 7, 0, 2 / 4, np.nan])
    assert outcomes.confusion(label, predicted, 4).tolist() == [
        [2, 0, 1, 0],
        [1, 0, 0, 0],
        [1, 0, 1, 0],
        [0, 0, 0, 0],
    ]
    assert outcomes.confused(label, predicted, most=2) == [(0, 2, 1), (1, 0, 1)]
    assert outcomes.confused(label, label) == []


def test_calibration_is_that_of_each_bin_weighed_by_its_samples() -> None:
    confidence = np.array([0.95, 0.95, 0.95, 0.95, 0.55, 0.55, 0.25], np.float32)
    right = np.array([1, 1, 1, 0, 1, 0, 1], bool)
    curve = outcomes.reliability(confidence, right, bins=10)
    assert curve.samples.tolist() == [0, 0, 1, 0, 0, 2, 0, 0, 0, 4]
    np.testing.assert_allclose(curve.accuracy[[2, 5, 9]], [1, 0.5, 0.75])
    assert np.isnan(curve.accuracy[0])
    assert curve.error == pytest.approx((1 * 0.75 + 2 * 0.05 + 4 * 0.2) / 7, abs=1e-6)
    none = outcomes.reliability(np.array([np.nan]), np.array([False]))
    assert np.isnan(none.error) and none.samples.sum() == 0
    assert outcomes.reliability(np.array([0.0, 1.0]), np.array([False, True])).error == 0


def told(loss: list[float], probability: list[list[float]]) -> outcomes.Outcomes:
    count = len(loss)
    ranked = np.tile(np.arange(2), (count, 1))
    return outcomes.Outcomes(
        np.arange(count), np.arange(count) % 2, ranked, np.array(probability, np.float32),
        np.array(probability, np.float32)[:, 0], np.array(loss, np.float32),
    )  # fmt: skip


def test_worst_is_a_loss_that_is_no_number_and_most_doubtful_the_closest_race() -> None:
    some = told([1, np.nan, 3, 2], [[0.9, 0.1], [0.6, 0.4], [0.55, 0.45], [0.7, 0.1]])
    assert outcomes.worst(some, 3).tolist() == [1, 2, 3]
    assert outcomes.doubtful(some, 2).tolist() == [2, 1]
    sliced = outcomes.slices(["b", "a", "b", "a"], some)
    assert [(one.value, one.samples, one.accuracy) for one in sliced] == [("a", 2, 0), ("b", 2, 1)]
    assert sliced[1].loss == 2


# --- files -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run on images that a CSV file lists; the eval set has no striped one, but a font."""
    top = tmp_path_factory.mktemp("trained")
    for part, count in (("train", 30), ("eval", 20)):
        rows = [(f"{part}/{path.name}", name) for path, name in write_images(top / part, count, seed=count)]
        shown = [(*row, "serif" if n % 3 else "sans") for n, row in enumerate(rows)]
        shown = [row for row in shown if part == "train" or row[1] != "striped"]
        write_csv(top / f"{part}.csv", [("file_name", "label", "font"), *shown])
    words = [f"data.root={top}", f"run.dir={top}/runs", "data.name=csv",
             "data.args.annotations_file=train.csv", "data.args.eval_annotations_file=eval.csv",
             "data.args.image_column=file_name",
             "data.args.label_column=label", "data.workers=0", "optim.lr=0.05", "train.batch_size=6",
             "train.steps=9", "eval.batch_size=4", "wandb.mode=disabled", "device=cpu",
             "threads=1"]  # fmt: skip
    fit(load([], words))
    return top


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.long
def test_what_is_saved_is_what_the_model_says_and_the_same_on_two_processes(
    trained: Path, ranks: Callable[..., list[Finished]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)
    done = evaluation.evaluate("runs/run", by="font")
    (folder,) = (trained / "runs/run/evaluations").iterdir()
    assert done.folder == folder.relative_to(trained)
    model, saved = load_model(trained / "runs/run")
    rows = rows_of(folder / "predictions.csv")
    assert [row["image"] for row in rows] == [
        str(trained / row["file_name"]) for row in rows_of(trained / "eval.csv")
    ]
    for row in rows:
        scores = model(read_image(Path(row["image"]))[None] / 255)[0].detach()
        probabilities, label = scores.softmax(0), saved["classes"].index(row["class"])
        order = probabilities.argsort(descending=True).tolist()
        assert [row[f"class_{n}"] for n in (1, 2, 3)] == [saved["classes"][n] for n in order]
        told = [float(row[f"probability_{n}"]) for n in (1, 2, 3)]
        assert told == pytest.approx(probabilities.sort(descending=True).values.tolist(), abs=1e-5)
        assert float(row["probability"]) == pytest.approx(float(probabilities[label]), abs=1e-5)
        assert float(row["loss"]) == pytest.approx(-float(probabilities[label].log()), abs=1e-4)
    right = sum(row["class"] == row["class_1"] for row in rows)
    notes = json.loads((folder / "evaluation.json").read_text())
    assert (
        notes["metrics"]["eval/accuracy"] == pytest.approx(right / len(rows))
        and notes["step"] == saved["step"]
    )
    by_name = {row["class"]: row for row in rows_of(folder / "classes.csv")}
    assert (by_name["striped"]["samples"], by_name["striped"]["recall"]) == ("0", "")
    matrix = np.array([list(row.values())[1:] for row in rows_of(folder / "confusion.csv")], int)
    assert matrix.sum(1).tolist() == [7, 7, 0] and np.trace(matrix) == right
    assert {row["value"]: row["samples"] for row in rows_of(folder / "slices.csv")} == {
        "sans": "7",
        "serif": "7",
    }
    assert np.asarray(Image.open(folder / "worst.png").convert("L")).std() > 20
    assert np.asarray(Image.open(folder / "confusion.png").convert("L")).std() > 20

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match=r"is there already; --overwrite replaces it"):
        evaluation.evaluate("runs/run")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    first, second = ranks(2, "eval", "runs/run", "--save", "--by", "font", "--overwrite", cwd=trained)
    assert (first.rc, second.rc, second.out) == (0, 0, ""), (first, second)
    assert f"eval/accuracy {done.metrics['eval/accuracy']:.6g}\n" in first.out
    assert first.out.endswith(f"written: {done.folder}\n") and "sans " in first.out
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    outcome, _, names = evaluation.read(folder)
    assert outcome.loss.dtype == np.float32 and len(outcome) == len(names) == len(rows)
    told = "not what `eval --save` writes; delete it, or write it anew"
    for damaged in ({"ranked": outcome.ranked * 10**9}, {"ranked": -outcome.ranked - 1}, {"loss": [0.0]}):
        np.savez(folder / "outcomes.npz", **{**vars(outcome), **damaged})
        with pytest.raises(UserError, match=told):
            evaluation.read(folder)
    (folder / "outcomes.npz").write_bytes(before["outcomes.npz"][:300])
    with pytest.raises(UserError, match=told):
        evaluation.read(folder)


def test_images_that_cant_be_read_are_left_out_and_the_others_keep_their_names(
    trained: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    listed = rows_of(trained / "eval.csv")
    (tmp_path / "eval").symlink_to(trained / "eval")
    (tmp_path / "broken.png").write_text("no picture")
    rows = [(row["file_name"], row["label"]) for row in listed]
    rows.insert(5, ("broken.png", "dark"))
    write_csv(tmp_path / "train.csv", [("file_name", "label"), *rows, ("eval/002.png", "striped")])
    write_csv(tmp_path / "eval.csv", [("file_name", "label"), *rows])
    changed = [f"data.root={tmp_path}", "data.on_bad_sample=skip"]
    folder = evaluation.evaluate(trained / "runs/run", changed).folder
    assert folder and "broken.png: not a readable image" in capsys.readouterr().err
    saved = rows_of(folder / "predictions.csv")
    assert [row["image"] for row in saved] == [str(tmp_path / row["file_name"]) for row in listed]
    assert [row["class"] for row in saved] == [row["label"] for row in listed]


def test_what_is_not_offered_is_told_in_a_sentence(
    trained: Path, cli: Callable[..., Finished], here: Callable[..., Any], small: list[str]
) -> None:
    wrong = cli("eval", "runs/run", "--by", "fount", cwd=trained)
    assert wrong.rc == 2 and "has no column 'fount' (did you mean 'font'?)" in wrong.err, wrong
    here(*small, "train.steps=1")
    with pytest.raises(UserError, match="--by: only images listed in a CSV file have columns, not"):
        evaluation.evaluate("runs/run", by="font")
    with pytest.raises(UserError, match="'Segmentation' is no classification, so there are no predictions"):
        outcomes.Keeping(Segmentation())


class Alone:
    """One process."""

    @staticmethod
    def gather(value: Any) -> list[Any]:
        """Its own value."""
        return [value]


def test_only_some_numbers_of_each_sample_are_kept_and_all_samples_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outcomes, "ROOM", 8)
    scores, keeping = torch.randn(20, 500), outcomes.Keeping(Classification())
    for first, last in ((0, 5), (5, 8), (8, 20)):
        numbers = np.arange(first, last)
        part = Part(0, 0, numbers, len(numbers), len(numbers))
        batch = Batch(scores[first:last], torch.from_numpy(numbers), part)
        keeping.sums(lambda inputs: inputs, batch)  # type: ignore[arg-type]
    sizes = [tensor.untyped_storage().nbytes() for pair in keeping.kept for tensor in pair]
    assert sum(sizes) == 3 * 8 * 5 * (8 + 4)  # of 500 classes none but the first ones
    said = keeping.gathered(Alone())  # type: ignore[arg-type]
    assert said.sample.tolist() == said.label.tolist() == list(range(20))
    assert said.predicted.tolist() == scores.argmax(1).tolist()
    np.testing.assert_allclose(said.of_label, scores.softmax(1)[range(20), range(20)], rtol=1e-5)
    np.testing.assert_allclose(said.loss, -np.log(said.of_label), rtol=1e-4)


def test_equal_scores_are_of_the_first_class_as_in_the_accuracy() -> None:
    keeping = outcomes.Keeping(Classification())
    batch = Batch(torch.zeros(2, 1), torch.tensor([0, 3]), Part(0, 0, np.array([4, 2]), 2, 2))
    sums = keeping.sums(lambda inputs: torch.zeros(2, 20), batch)  # type: ignore[arg-type]
    said = keeping.gathered(Alone())  # type: ignore[arg-type]
    assert said.sample.tolist() == [2, 4] and said.label.tolist() == [3, 0]
    assert said.predicted.tolist() == [0, 0] and int(said.right.sum()) == int(sums["accuracy"])
    np.testing.assert_allclose(said.loss, np.log(20), rtol=1e-6)
