"""Predicting and evaluating: from a run's folder or one checkpoint file, in a fresh process, and safely."""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.processes import Finished, environment
from tests.worlds import CLASSES, write_images

RECIPE = [
    "model.name=cnn",
    "model.args.widths=[8,16]",
    "optim.lr=0.1",
    "train.batch_size=12",
    "train.steps=40",
]

PREDICT = ["-m", "dist_train", "predict"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that tells three kinds of pictures apart, and pictures it has not seen."""
    import subprocess
    import sys

    folder = tmp_path_factory.mktemp("trained")
    for name in CLASSES:
        (folder / "data" / "train" / name).mkdir(parents=True)
        (folder / "data" / "val" / name).mkdir(parents=True)
    for part, count, seed in (("train", 60, 1), ("val", 31, 2)):
        for path, name in write_images(folder / "raw" / part, count, seed=seed):
            shutil.move(path, folder / "data" / part / name / path.name)
    write_images(folder / "new", 6, seed=3)
    command = ["-m", "dist_train", "train", "data.name=image_folder", "data.root=data", "data.workers=0",
               "wandb.mode=disabled", "device=cpu", *RECIPE]  # fmt: skip
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_predictions_name_the_classes_in_a_table_in_csv_and_in_json(
    trained: Path, cli: Callable[..., Finished]
) -> None:
    table = cli("predict", "runs/run", "new", cwd=trained)
    assert table.rc == 0, table
    assert [line.split()[1] for line in table.out.splitlines()] == CLASSES * 2
    rows = list(
        csv.DictReader(io.StringIO(cli("predict", "runs/run", "new", "--format", "csv", cwd=trained).out))
    )
    assert [row["class_1"] for row in rows] == CLASSES * 2
    assert all(1 / 3 < float(row["probability_1"]) <= 1 for row in rows)
    cli(
        "predict",
        "runs/run",
        "new/000.png",
        "--format",
        "json",
        "--output",
        "p.json",
        "--top",
        2,
        cwd=trained,
    )
    (row,) = json.loads((trained / "p.json").read_text())
    assert row["class"] == CLASSES[0]
    assert [len(row["top"]), row["top"][0][0]] == [2, CLASSES[0]]


@pytest.mark.long
def test_a_name_that_is_no_utf8_is_escaped_and_an_output_is_there_whole_or_not_at_all(
    trained: Path, cli: Callable[..., Finished], run: Callable[..., Finished], tmp_path: Path
) -> None:
    folder, output = tmp_path / "named", tmp_path / "out"
    folder.mkdir()
    source = next((trained / "data" / "val" / "dark").iterdir())
    shutil.copy(source, os.fsencode(folder) + b"/caf\xe9.png")
    shutil.copy(source, folder / "K\u00e4se.png")
    for format in ("csv", "json", "table"):
        result = cli("predict", trained / "runs/run", folder, "--format", format, "--output", output)
        assert (result.rc, result.err) == (0, ""), result
        text = output.read_bytes().decode("utf-8")
        told = [row["image"] for row in json.loads(text)] if format == "json" else text
        assert any("caf\\xe9.png" in name for name in (told if format == "json" else [text]))
    before = output.read_bytes()
    printed = run(*PREDICT, trained / "runs/run", folder, env={"PYTHONIOENCODING": "ascii"})
    assert printed.rc == 0 and "K\\xe4se.png" in printed.out, printed
    (tmp_path / "sealed").mkdir()
    link = tmp_path / "sealed" / "link"
    link.symlink_to(output)
    assert cli("predict", trained / "runs/run", folder, "--output", link).rc == 0
    assert link.is_symlink() and output.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["named", "out", "sealed"]


@pytest.mark.long
def test_output_that_nobody_reads_or_that_finds_no_room_leaves_no_traceback(
    trained: Path, run: Callable[..., Finished]
) -> None:
    words = [sys.executable, *PREDICT, "runs/run", "data/val/dark"]
    buffered = {"PYTHONUNBUFFERED": ""}
    script = f"{shlex.join(words)} | true; echo ${{PIPESTATUS[0]}}"
    result = run("bash", "-c", script, cwd=trained, env=buffered)
    assert (result.out, result.err) == ("1\n", ""), result
    full = run("bash", "-c", f"{shlex.join(words)} >/dev/full", cwd=trained, env=buffered)
    assert (full.rc, full.err) == (1, "dist-train: the output can't be written: No space left on device.\n")


def test_one_checkpoint_file_elsewhere_is_enough(
    trained: Path, tmp_path: Path, cli: Callable[..., Finished]
) -> None:
    shutil.copy(trained / "runs/run/checkpoints/last.pt", tmp_path / "only.pt")
    shutil.copy(trained / "new/001.png", tmp_path)
    finished = cli("predict", "only.pt", "001.png", cwd=tmp_path)
    assert finished.rc == 0, finished
    assert finished.out.split()[1] == CLASSES[1]


def test_what_is_no_image_is_named_after_the_rest_is_done(
    trained: Path, tmp_path: Path, cli: Callable[..., Finished]
) -> None:
    (tmp_path / "text.png").write_text("no picture")
    good = trained / "new" / "002.png"
    finished = cli("predict", trained / "runs/run", tmp_path / "text.png", good, "nowhere.png", cwd=tmp_path)
    assert finished.rc == 2
    assert finished.out.split()[1] == CLASSES[2]
    assert "text.png: not a readable image" in finished.err
    assert "nowhere.png: there is no such image file" in finished.err
    assert "Traceback" not in finished.err


def test_evaluation_of_the_run_repeats_its_metrics_on_one_and_two_processes(
    trained: Path, cli: Callable[..., Finished], ranks: Callable[..., list[Finished]]
) -> None:
    best = torch.load(trained / "runs/run/checkpoints/best.pt", weights_only=True)["metrics"]
    alone = cli("eval", "runs/run", cwd=trained)
    first, second = ranks(2, "eval", "runs/run", cwd=trained)
    assert (alone.rc, first.rc, second.rc) == (0, 0, 0), (alone, first)
    assert f"eval/accuracy {best['eval/accuracy']:.6g}" in alone.out
    assert alone.out.splitlines()[1] == first.out.splitlines()[1]
    assert not second.out


def test_a_checkpoint_with_code_in_it_is_refused_and_the_code_not_run(
    trained: Path, tmp_path: Path, cli: Callable[..., Finished]
) -> None:
    class Code:
        def __reduce__(self) -> Any:
            return (open, (str(tmp_path / "it-ran"), "w"))

    state = torch.load(trained / "runs/run/checkpoints/last.pt", weights_only=True)
    torch.save({**state, "classes": Code()}, tmp_path / "evil.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Code()))
    for name, reason in (("evil.pt", "refused"), ("pickle.pt", "no checkpoint")):
        finished = cli("predict", name, trained / "new/000.png", cwd=tmp_path)
        assert finished.rc == 2
        assert reason in finished.err
        assert "Traceback" not in finished.err
    assert not (tmp_path / "it-ran").exists()


def test_a_damaged_checkpoint_is_refused_or_loads_the_very_same(trained: Path, tmp_path: Path) -> None:
    """One bit flipped at many places of the file, and the file cut at many lengths."""
    from dist_train.checkpoint import load
    from dist_train.config import UserError
    from tests.distributed.ranks import equal

    whole = (trained / "runs/run/checkpoints/last.pt").resolve()
    data, state, path = whole.read_bytes(), load(whole), tmp_path / "step-00000040.pt"
    refused = 0
    places = range(0, len(data), max(1, len(data) // 150))
    for place in places:
        flipped = bytearray(data)
        flipped[place] ^= 1 << (place % 8)
        path.write_bytes(flipped)
        try:
            assert equal(load(path), state), place
        except UserError:
            refused += 1
    assert refused > len(places) * 0.3  # most of so small a file is padding between tensors
    for length in range(0, len(data), len(data) // 20):
        path.write_bytes(data[:length])
        with pytest.raises(UserError):
            load(path)
