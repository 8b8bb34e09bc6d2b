"""Exported files compute what the run's model computes, say what they are, and do nothing unasked."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from dist_train import __version__, checkpoint, exported
from dist_train.config import RunError, UserError
from dist_train.data import ImageTransform
from dist_train.data.fashion_mnist import ASSETS
from dist_train.exported import SUFFIXES
from dist_train.predict import evaluate_run, load_model, predict
from dist_train.tools import export as exporting
from dist_train.tools.export import export
from dist_train.tools.generate import continue_prompt
from dist_train.tools.served import resized
from tests.processes import Finished
from tests.worlds import SMALL, write_images

MEAN, STD = 0.286, 0.353
CNN = ["model.name=cnn", "model.args.widths=[8,16]", f"data.mean=[{MEAN}]", f"data.std=[{STD}]"]
AVERAGED = [*SMALL, *CNN, "train.ema=0.9"]
FORMATS = ["safetensors", "torch.export", pytest.param("onnx", marks=pytest.mark.long)]


@pytest.fixture
def onnx(missing: Callable[[str], NoReturn]) -> Any:
    """onnxruntime, where all that an export to ONNX needs is here."""
    for name in ("onnx", "onnxscript"):
        try:
            __import__(name)
        except ModuleNotFoundError:
            missing(f"{name} is not here")
    return pytest.importorskip("onnxruntime")


@pytest.mark.long
def test_programs_of_onnx_and_torch_agree_with_the_model_on_a_thousand_real_images(
    here: Callable[..., Any], onnx: Any, tmp_path: Path
) -> None:
    """Run by onnxruntime and torch alone, on the bytes of Fashion-MNIST's files, in batches of any size."""
    words = [*AVERAGED, "data.name=fashion_mnist", f"data.root={ASSETS}", "train.batch_size=100"]
    here(*words, "train.steps=40", "train.ema=0.8")
    done = {
        kind: export("runs/run", kind, preprocess=True) for kind in ("onnx", "torch.export")
    }  # both check themselves
    assert all(each.difference <= 1e-5 and each.samples == 64 for each in done.values())
    pixels = gzip.decompress((ASSETS / "t10k-images-idx3-ubyte.gz").read_bytes())[16:]
    images = np.frombuffer(pixels, np.uint8).reshape(-1, 1, 28, 28)
    assert len(images) == 1000
    model, _ = load_model("runs/run")
    with torch.inference_mode():
        values = (torch.from_numpy(images.copy()).float() / 255 - MEAN) / STD
        expected = model(values).softmax(1)
    assert len(expected.argmax(1).unique()) > 5  # it has learned something
    session = onnx.InferenceSession("run.onnx", providers=["CPUExecutionProvider"])
    (given,), (gives,) = session.get_inputs(), session.get_outputs()
    assert (given.type, given.shape, gives.name) == ("tensor(uint8)", ["batch", 1, 28, 28], "probabilities")
    program = torch.export.load("run.pt2").module()
    for some in np.split(images, [1, 3, 400]):
        first = 0 if some.base is None else int(np.flatnonzero((images == some[0]).all((1, 2, 3)))[0])
        wanted = expected[first : first + len(some)]
        for found in (session.run(None, {given.name: some})[0], program(torch.from_numpy(some.copy()))):
            found = torch.as_tensor(found).detach()
            assert (found - wanted).abs().max() <= 1e-5
            assert torch.equal(found.argmax(1), wanted.argmax(1))
    notes = session.get_modelmeta().custom_metadata_map
    assert json.loads(notes["classes"])[9] == "Ankle boot"
    assert (notes["dist_train"], notes["run"], notes["step"]) == (__version__, "run", "40")
    assert [json.loads(notes[key]) for key in ("mean", "std", "transforms")] == [[MEAN], [STD], []]


@pytest.mark.parametrize("kind", FORMATS)
def test_predict_and_eval_of_a_file_give_what_those_of_the_run_give(
    kind: str, here: Callable[..., Any], npz: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    if kind == "onnx":
        request.getfixturevalue("onnx")
    here(*AVERAGED)
    images = [path for path, _ in write_images(tmp_path / "new", 5, seed=4)]
    rows, _ = predict("runs/run", images)
    metrics = evaluate_run("runs/run")
    for preprocess in {"safetensors": [False], "torch.export": [False, True], "onnx": [True]}[kind]:
        out = Path(f"{preprocess}{SUFFIXES[kind]}")
        done = export("runs/run", kind, out, preprocess=preprocess)
        assert done.difference <= 1e-5
        assert done.input == f"{'uint8' if preprocess else 'float32'} [B, 1, 8, 8]"
        found, errors = predict(out, images, trust=True)
        assert not errors
        for row, wanted in zip(found, rows, strict=True):
            assert (row["image"], row["class"]) == (wanted["image"], wanted["class"])
            assert row["probability"] == pytest.approx(wanted["probability"], abs=1e-5)
        again = evaluate_run(out, trust=True)
        assert again["eval/accuracy"] == metrics["eval/accuracy"]
        assert again["eval/loss"] == pytest.approx(metrics["eval/loss"], abs=1e-5)
    assert not list(tmp_path.glob("part-*"))


def test_the_moving_average_is_what_is_exported(here: Callable[..., Any], npz: Path) -> None:
    here(*AVERAGED)
    export("runs/run", "safetensors")
    saved = checkpoint.load(checkpoint.find("runs/run"))
    with safe_open("run.safetensors", "pt") as file:  # type: ignore[no-untyped-call]
        assert json.loads(file.metadata()["classes"]) == saved["classes"]
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert weights.keys() == saved["average"].keys()
    assert all(torch.equal(weights[name], saved["average"][name]) for name in weights)
    assert not all(torch.equal(weights[name], saved["model"][name]) for name in weights)


@pytest.mark.long
def test_a_language_model_goes_on_with_a_prompt_of_any_length_as_an_exported_program_too(
    here: Callable[..., Any], onnx: Any, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("All work and no play makes Jack a dull boy. " * 40)
    words = ["task.name=language", "data.name=text", "data.root=text.txt", "data.args.context=16"]
    sizes = ["model.name=gpt", "model.args.width=16", "model.args.depth=1", "data.eval_fraction=0.2"]
    here(*SMALL, *words, *sizes, "train.steps=3", "optim.lr=0.01")
    text = continue_prompt("runs/run", "All", length=20, temperature=0)
    for kind in SUFFIXES:
        done = export("runs/run", kind)
        assert done.input == "int64 [B, T <= 16]" and done.difference <= 1e-5
        assert continue_prompt(done.path, "All", 20, temperature=0, trust=True) == text
    with pytest.raises(UserError, match="--preprocess: takes images of 8 bits, and these inputs are none"):
        export("runs/run", "onnx", Path("bytes.onnx"), preprocess=True)


SHORTER = [{"Resize": {"size": 24}}, {"CenterCrop": {"size": [20, 16]}}]
BOTH = [{"Resize": {"size": [9, 30], "interpolation": 3}}]


@pytest.mark.parametrize("names", [SHORTER, BOTH], ids=["bilinear", "bicubic"])
def test_images_are_resized_and_cropped_by_matrices_to_the_pixels_of_the_transforms(names: list[Any]) -> None:
    inside, transform = resized(names), ImageTransform(names)
    for size in ((40, 61), (61, 40), (30, 30), (24, 25), (11, 17), (200, 35)):
        image = torch.from_numpy(np.random.default_rng(size[0]).integers(0, 256, (2, 3, *size), np.uint8))
        away = (inside(image.float()) - transform.geometry(image).float()).abs()
        assert away.max() <= 1.5 and away.mean() < 0.5, (size, away.max())  # of 255; these are rounded twice


@pytest.mark.long
def test_a_program_takes_images_of_any_size_if_it_resizes_them_itself(
    here: Callable[..., Any], onnx: Any, image_folder: Path
) -> None:
    """Also `predict` and `eval` do it then."""
    random = np.random.default_rng(0)
    paths = sorted((image_folder / "val").rglob("*.png"))
    for path in paths:
        height, width = random.integers(20, 60, 2)
        Image.open(path).convert("RGB").resize((width, height)).save(path)
    words = [*SMALL, "model.name=cnn", "model.args.widths=[8,16]", "data.name=image_folder", "train.steps=20"]
    words += [f"data.root={image_folder}", "data.mean=[0.4]", "data.std=[0.3]"]
    here(*words, f"data.eval_transform={json.dumps(SHORTER)}")
    metrics, (rows, _) = evaluate_run("runs/run"), predict("runs/run", paths)
    done = export("runs/run", "onnx", resize=True)
    assert done.difference <= 1e-5 and (done.input, done.samples) == ("uint8 [B, 3, H, W]", len(paths))
    found, errors = predict(done.path, paths)
    assert not errors
    for row, wanted in zip(found, rows, strict=True):  # pixels are not rounded
        assert row["probability"] == pytest.approx(wanted["probability"], abs=0.02)
    again = evaluate_run(done.path)
    assert again["eval/loss"] == pytest.approx(metrics["eval/loss"], abs=0.02)
    for changed, told in (
        ("[Grayscale]", "takes one Resize into a program, and a CenterCrop"),
        ("[{Resize: {size: 24}}]", "all images need one size"),
        ("[{Resize: {size: 24, max_size: 30}}, {CenterCrop: {size: 20}}]", "without a max_size"),
        ("[{Resize: {size: 12}}, {CenterCrop: {size: 20}}]", "is larger than what Resize leaves"),
    ):
        with pytest.raises(UserError, match=told):
            resized(yaml.safe_load(changed))


def test_a_run_may_be_called_as_a_file_is(tmp_path: Path) -> None:
    (tmp_path / "tuned.onnx").mkdir()
    assert not exported.is_exported(tmp_path / "tuned.onnx") and exported.is_exported("other.onnx")


def test_a_file_that_comes_while_another_is_written_is_not_overwritten(
    here: Callable[..., Any], npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here(*SMALL)
    plain = exporting.WRITERS["safetensors"]

    def slow(model: Any, example: Any, path: Path, notes: dict[str, str]) -> None:
        plain(model, example, path, notes)
        Path("run.safetensors").write_text("another")

    monkeypatch.setitem(exporting.WRITERS, "safetensors", slow)
    with pytest.raises(UserError, match=r"run.safetensors exists already"):
        export("runs/run", "safetensors")
    assert Path("run.safetensors").read_text() == "another"
    assert [path.name for path in Path().glob("*safetensors")] == ["run.safetensors"]
    Path("run.safetensors").unlink()
    monkeypatch.setitem(exporting.WRITERS, "safetensors", plain)
    Path("run.safetensors").symlink_to("elsewhere")
    with pytest.raises(UserError, match=r"run.safetensors exists already"):
        export("runs/run", "safetensors")
    assert not Path("elsewhere").exists()


def test_a_file_is_refused_that_computes_something_else_and_none_is_left(
    here: Callable[..., Any], npz: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(NOISY)
    here(*SMALL, "model.name=mine:Noisy")
    with pytest.raises(UserError, match="--trust"):
        export("runs/run", "torch.export")
    with pytest.raises(RunError, match=r"run.pt2 is not written: .* off by"):
        export("runs/run", "torch.export", trust=True)
    assert not list(tmp_path.glob("*.pt2"))


NOISY = """
import torch

class Noisy(torch.nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.layer = torch.nn.Linear(64, num_classes)

    def forward(self, images):
        return self.layer(images.flatten(1)) + torch.rand(1)
"""


def test_mistakes_are_told_and_nothing_is_overwritten(
    here: Callable[..., Any], npz: Path, cli: Callable[..., Finished], tmp_path: Path
) -> None:
    here(*SMALL)
    first = cli("export", "runs/run", "--to", "safetensors")
    assert first.rc == 0, first
    assert "written: run.safetensors" in first.out and "float32 [B, 1, 8, 8] -> scores" in first.out
    before = Path("run.safetensors").read_bytes()
    second = cli("export", "runs/run", "--to", "safetensors")
    told = "dist-train: --out: run.safetensors exists already; give the name of a new file.\n"
    assert (second.rc, second.out, second.err) == (2, "", told)
    assert Path("run.safetensors").read_bytes() == before
    for kind, out, more, told in (
        ("torchexport", None, {}, "did you mean 'torch.export'?"),
        ("torch.export", "model.onnx", {}, "a file of torch.export ends with .pt2"),
        ("torch.export", "nowhere/model.pt2", {}, "no folder to write to"),
        ("safetensors", "b.safetensors", {"preprocess": True}, "does nothing to images"),
        ("torch.export", None, {"overrides": ["data.root=gone.npz"]}, "gone.npz"),
    ):
        with pytest.raises(UserError, match=re.escape(told)):
            export("runs/run", kind, out and Path(out), **more)  # type: ignore[arg-type]
    (tmp_path / "a.pt2").write_text("anything")
    with pytest.raises(UserError, match=r"a.pt2: can't be read as .pt2"):
        load_model("a.pt2", trust=True)


def test_a_file_from_elsewhere_runs_nothing(here: Callable[..., Any], npz: Path, tmp_path: Path) -> None:
    here(*SMALL)
    export("runs/run", "safetensors")
    with safe_open("run.safetensors", "pt") as file:  # type: ignore[no-untyped-call]
        notes, weights = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    config = json.loads(notes["config"])
    config["model"] = {"name": "os:system", "args": {"command": f"touch {tmp_path}/it-ran"}}
    for changed, told in (
        ({"config": json.dumps(config)}, "os:system"),
        ({"classes": "[1]"}, "doesn't say what its images and classes are"),
        ({"input_shape": "[1, -8, 8]"}, "doesn't say"),
        ({"input_shape": "[1, 90000, 90000]"}, "images of shape"),
    ):
        save_file(weights, "evil.safetensors", notes | changed)
        with pytest.raises(UserError, match=told):
            load_model("evil.safetensors")
    save_file(weights, "plain.safetensors")
    with pytest.raises(UserError, match="doesn't say what its images"):
        load_model("plain.safetensors")
    assert not (tmp_path / "it-ran").exists()
    export("runs/run", "torch.export")
    with pytest.raises(UserError, match=r"torch may run code .* --trust"):
        load_model("run.pt2")
    assert isinstance(load_model("run.pt2", trust=True)[0], nn.Module)
