"""What is read, and in which order: sources, the split, the batches of each rank."""

from __future__ import annotations

import contextlib
import gzip
import os
import shutil
import struct
import zipfile
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from dist_train import data
from dist_train.config import Config, UserError, from_mapping
from dist_train.data import fashion_mnist as fashion
from dist_train.data import loader
from dist_train.data.images import image_paths, read_image
from dist_train.data.order import DistributedSampler, EvalSampler, Order
from dist_train.data.sources import open_source
from dist_train.data.transforms import ImageTransform
from dist_train.runtime import Runtime
from tests.processes import Finished
from tests.worlds import CLASSES, SMALL, pictures, write_csv, write_images


def config(**sections: dict[str, Any]) -> Config:
    return from_mapping({"train": {"epochs": 1, "batch_size": 8}} | sections)


def rank(number: int = 0, world_size: int = 1) -> Runtime:
    """A rank without a process group: enough to make loaders with."""
    return Runtime(None, torch.device("cpu"), number, number, world_size, world_size)  # type: ignore[arg-type]


def everything(loader: Any) -> tuple[torch.Tensor, torch.Tensor]:
    batches = [batch.to(torch.device("cpu")) for batch in loader]
    return torch.cat([b.inputs for b in batches]), torch.cat([b.targets for b in batches])


# --- Fashion-MNIST: where it is looked for -----------------------------------------------------------


def write_idx(folder: Path, count: int, gzipped: bool = True) -> Path:
    """The four files of Fashion-MNIST with so many images each."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, (name, shape) in product(
        ("train", "t10k"), (("images-idx3", (count, 28, 28)), ("labels-idx1", (count,)))
    ):
        header = struct.pack(f">i{len(shape)}i", 2048 + len(shape), *shape)
        content = header + bytes(int(np.prod(shape)))
        path = folder / f"{part}-{name}-ubyte"
        if gzipped:
            path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(content))
        else:
            path.write_bytes(content)
    return folder


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A machine without Fashion-MNIST and without a network; returns the list of tried downloads."""
    tried: list[str] = []

    def download(target: Path) -> bool:
        tried.append(str(target))
        return False

    monkeypatch.setattr(fashion, "DEBIAN", tmp_path / "debian")
    monkeypatch.setattr(fashion, "_download_fashion_mnist", download)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache" / "hub"))
    return tried


def test_fashion_mnist_is_looked_for_in_this_order(
    nowhere: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"

    def found() -> int:
        return len(fashion.fashion_mnist(str(root), train=False))

    root.mkdir()
    assert found() == 1000  # the shipped sample
    assert nowhere == [str(root)]

    def download(target: Path) -> bool:
        write_idx(target / "FashionMNIST" / "raw", 5)
        return True

    monkeypatch.setattr(fashion, "_download_fashion_mnist", download)
    assert found() == 5  # torchvision's download
    write_idx(tmp_path / "cache" / "dist_train" / "FashionMNIST" / "raw", 4)
    assert len(fashion.fashion_mnist(None)) == 4  # an earlier one
    write_idx(tmp_path / "debian", 3)
    assert len(fashion.fashion_mnist(None)) == 3  # Debian's package
    write_idx(root, 2, gzipped=False)
    assert found() == 2  # data.root, unpacked
    write_idx(root, 1)
    assert found() == 1  # data.root, as it is distributed


def test_the_shipped_sample_is_used_with_one_line_that_says_so(
    tmp_path: Path, cli: Callable[..., Finished]
) -> None:
    (tmp_path / "hidden.py").write_text(
        "import pathlib, torch, dist_train.data.fashion_mnist as fashion\n"
        "fashion.DEBIAN = pathlib.Path('nowhere'); torch.hub.set_dir('cache/hub')\n"
        "from dist_train.cli import main; main()\n"
    )
    words = ["data.name=fashion_mnist", "data.root=null", "data.args.download=false"]
    result = cli("hidden.py", "train", *SMALL, *words)
    assert result.rc == 0, result
    told = [line for line in result.err.splitlines() if "sample" in line and "data.root" in line]
    assert len(told) == 1, result
    assert "6,000 training and 1,000 test images" in told[0]


def test_the_shipped_sample_is_the_beginning_of_the_real_one(missing: Callable[[str], Any]) -> None:
    if not fashion.DEBIAN.is_dir():
        missing(f"the whole Fashion-MNIST is not in {fashion.DEBIAN}")
    for train, count in ((True, 6000), (False, 1000)):
        whole = fashion.fashion_mnist(str(fashion.DEBIAN), train)
        sample = fashion.fashion_mnist(str(fashion.ASSETS), train)
        assert len(sample) == count
        assert torch.equal(whole.images[:count], sample.images)
        assert torch.equal(whole.labels[:count], sample.labels)


# --- the other sources -------------------------------------------------------------------------------


def test_an_image_folder_has_a_class_per_folder(image_folder: Path) -> None:
    train = open_source("image_folder", str(image_folder), True, {})
    held = open_source("image_folder", str(image_folder), False, {})
    assert (len(train), len(held), train.classes, held.classes) == (30, 12, CLASSES, CLASSES)
    for index in range(30):
        image, label = train[index]
        assert (image.shape, image.dtype) == ((3, 8, 8), torch.uint8)
        assert train.path(index).parent.name == CLASSES[label]


def test_an_image_folder_may_be_grey_and_hold_its_classes_directly(image_folder: Path) -> None:
    source = open_source("image_folder", str(image_folder / "val"), True, {"channels": 1})
    assert (len(source), source[0][0].shape) == (12, (1, 8, 8))
    assert open_source("image_folder", str(image_folder / "val"), False, {}) is None


def test_a_named_folder_that_is_not_there_is_no_reason_to_take_all_folders_for_classes(
    image_folder: Path,
) -> None:
    for key in ("train_dir", "eval_dir"):
        with pytest.raises(UserError, match=rf"data.args.{key}: .*trian \(did you mean 'train'\?\)"):
            open_source("image_folder", str(image_folder), True, {key: "trian"})
    (image_folder / "train").rename(image_folder / "Train")
    with pytest.raises(UserError, match="has a folder 'Train' but no 'train'"):
        open_source("image_folder", str(image_folder), True, {})
    named = {"train_dir": "Train"}
    assert len(open_source("image_folder", str(image_folder), True, named)) == 30
    assert len(open_source("image_folder", str(image_folder), False, named)) == 12
    whole = {"train_dir": "."}
    assert open_source("image_folder", str(image_folder), True, whole).classes == ["Train", "val"]
    assert open_source("image_folder", str(image_folder), False, whole) is None


def test_hidden_folders_are_no_classes_and_hidden_files_no_images(image_folder: Path) -> None:
    image = (image_folder / "train" / "dark" / "001.png").read_bytes()
    for place in (".ipynb_checkpoints", "@eaDir", "dark/.ipynb_checkpoints", "dark/@eaDir/thumbs", "dark"):
        (image_folder / "train" / place).mkdir(parents=True, exist_ok=True)
        (image_folder / "train" / place / ("._x.png" if place == "dark" else "x.png")).write_bytes(image)
    source = open_source("image_folder", str(image_folder), True, {})
    assert (source.classes, len(source)) == (CLASSES, 30)
    assert len(image_paths(image_folder / "train")) == 30  # as a prediction lists them


LATIN = os.fsdecode("Käse".encode("latin-1"))  # no UTF-8


@pytest.mark.parametrize("name", ["Käse", "🧀 и сыр", pytest.param(LATIN, id="no UTF-8")])
def test_images_and_classes_may_have_any_name_that_a_file_can_have(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    try:
        rows = write_images(folder / "train" / name, 3)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    for path, _ in rows:
        path.rename(path.with_name(f"{name} {path.name}"))
    shutil.copytree(folder / "train", folder / "val")
    options = {"name": "image_folder", "root": str(folder)}
    sets = data.build(config(data=options))
    assert len(sets.train) == 3
    assert sets.classes == ["K\\xe4se" if name == LATIN else name]
    assert everything(sets.train_loader(config(data=options), rank(), 0, 1))[0].shape == (3, 3, 8, 8)
    listed = "".join(f"{name} {path.name},a\n" for path, _ in rows)
    (folder / "list.csv").write_bytes(os.fsencode(listed))
    source = open_source(
        "csv", str(folder), True, {"annotations_file": "list.csv", "img_dir": f"train/{name}"}
    )
    assert source.path(2) == folder / "train" / name / f"{name} 002.png" and source[2][1] == 0


@pytest.mark.long
def test_a_whole_run_may_have_names_in_any_letters(
    cli: Callable[..., Finished], run: Callable[..., Finished], image_folder: Path, tmp_path: Path
) -> None:
    """Run, folders, classes, images, recipe, pictures and predictions."""
    for part in ("train", "val"):
        (image_folder / part / "dark").rename(image_folder / part / "Käse 🧀")
    latin = image_folder / "train" / "bright" / f"{LATIN}.png"
    with contextlib.suppress(OSError):  # some file systems take UTF-8 only
        latin.write_bytes(b"no image")
    (tmp_path / "ä.yaml").write_text("data: {name: image_folder, root: Bilder ä}\n", encoding="utf-8")
    image_folder.rename(tmp_path / "Bilder ä")
    words = ["ä.yaml", *SMALL[2:], "run.dir=läufe", "run.name=Käse 🧀", "data.on_bad_sample=skip"]
    images = "Bilder ä/val/Käse 🧀"
    trained = run("-m", "dist_train", "train", *words, "wandb.mode=offline", env={"LC_ALL": "C"})
    assert trained.rc == 0, trained
    for command in (
        ["predict", "läufe/Käse 🧀", images, "--format", "csv", "--output", "für.csv"],
        ["eval", "läufe/Käse 🧀"],
        ["status", "läufe"],
        ["samples", *words, "data.on_bad_sample=stop", "--count", 2, "--output", "ä.png"],
    ):
        result = cli(*command)
        assert result.rc == 0, result
    folder = tmp_path / "läufe" / "Käse 🧀"
    predicted = (tmp_path / "für.csv").read_text("utf-8")
    assert f"{images}/001.png," in predicted and ",Käse 🧀," in predicted
    assert "dir: läufe" in (folder / "config.yaml").read_text("utf-8")
    if (tmp_path / "Bilder ä" / "train" / "bright" / latin.name).exists():
        assert "K\\xe4se.png" in (folder / "log.txt").read_text("utf-8")
    named = cli("config", *words, f"run.name={LATIN}")
    assert (named.rc, named.err.count("\n")) == (2, 1)
    assert "argument 'run.name=K\\xe4se': is no text in utf-8, the encoding of this locale" in named.err


def grey(folder: Path, name: str, array: np.ndarray) -> Path:
    path = folder / name
    if name.endswith(".pgm"):
        header = f"P5 {array.shape[1]} {array.shape[0]} 65535\n".encode()
        path.write_bytes(header + array.astype(">u2").tobytes())
    else:
        Image.fromarray(array).save(path)
    return path


@pytest.mark.parametrize(
    ("name", "kind", "white"),
    [
        ("a.png", np.uint8, 255),
        ("a.png", np.uint16, 65535),
        ("a.tif", np.uint16, 65535),
        ("a.pgm", np.uint16, 65535),
        ("a.tif", np.float32, 1),
    ],
)
def test_an_image_of_any_depth_is_read_in_shades(name: str, kind: type, white: float, tmp_path: Path) -> None:
    shades = np.linspace(0, 1, 12).reshape(3, 4)
    path = grey(tmp_path, name, (shades * white).astype(kind))
    for channels in (1, 3, 4):
        seen = ImageTransform()(read_image(path, channels))
        assert seen.shape == (channels, 3, 4)
        for channel in seen[:3]:
            assert np.allclose(channel, shades, atol=1 / 255)
        assert channels < 4 or bool((seen[3] == 1).all())


def test_an_image_whose_white_is_not_known_is_refused(tmp_path: Path) -> None:
    for number, array in enumerate((np.full((3, 4), 70_000, np.int32), np.full((3, 4), 1.5, np.float32))):
        path = grey(tmp_path, f"{number}.tif", array)
        with pytest.raises(data.images.BadSample, match=rf"{number}.tif: not a readable image \("):
            read_image(path)
    with pytest.raises(UserError, match="1, 3 or 4 channels, not 2"):
        read_image(path, 2)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "palette with transparency"])
def test_every_mode_of_an_image_is_read_alike(mode: str, tmp_path: Path, recwarn: Any) -> None:
    image = Image.new("RGB", (4, 3), (255, 255, 255))
    image.putpixel((0, 0), (0, 0, 0))
    if mode.startswith("palette"):
        image = image.convert("P")
        image.info["transparency"] = bytes([0] * 256)
    else:
        image = image.convert(mode)
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    image.save(path)
    for channels in (1, 3, 4):
        seen = read_image(path, channels)
        assert (seen.dtype, seen.shape) == (torch.uint8, (channels, 3, 4))
        assert set(seen[0].flatten().tolist()) == {0, 255} and seen[0, 0, 0] == 0
    assert not recwarn.list


@pytest.mark.parametrize("header", [True, False], ids=["header", "no header"])
@pytest.mark.parametrize("numbers", [True, False], ids=["numbers", "names"])
def test_a_csv_file_lists_images_with_their_labels(header: bool, numbers: bool, tmp_path: Path) -> None:
    rows = [
        (path.name, CLASSES.index(name) if numbers else name)
        for path, name in write_images(tmp_path / "pictures", 6)
    ]
    write_csv(tmp_path / "list.csv", [("image", "label"), *rows] if header else rows)
    args = {"annotations_file": "list.csv", "img_dir": "pictures"}
    source = open_source("csv", str(tmp_path), True, args)
    assert source.classes == (["0", "1", "2"] if numbers else CLASSES)
    assert [source[index][1] for index in range(6)] == [0, 1, 2, 0, 1, 2]
    assert source.path(5) == tmp_path / "pictures" / "005.png"
    assert open_source("csv", str(tmp_path), False, args) is None
    if numbers:
        named = open_source("csv", str(tmp_path), True, {**args, "classes": CLASSES})
        assert named.classes == CLASSES


def test_an_eval_csv_file_that_lacks_a_class_keeps_the_label_numbers(csv_data: Path) -> None:
    write_csv(
        csv_data / "few.csv", [("file", "label"), ("eval/001.png", "dark"), ("eval/002.png", "striped")]
    )
    args = {"annotations_file": "train.csv", "img_dir": "pictures", "eval_annotations_file": "few.csv"}
    source = open_source("csv", str(csv_data), False, args)
    assert source.classes == CLASSES
    assert [source[index][1] for index in range(2)] == [1, 2]


def csv_source(folder: Path, train: bool = True, **args: Any) -> data.images.ImageFiles:
    given = {"annotations_file": "list.csv", "img_dir": "pictures", **args}
    return open_source("csv", str(folder), train, given)  # type: ignore[no-any-return]


def labels_of(source: Any) -> list[int]:
    return list(source.labels.tolist())


@pytest.fixture
def listed(tmp_path: Path) -> Callable[..., Path]:
    """listed("list.csv", ["1", "cat"]) -> a CSV file of these labels, for images that are there."""
    files = [path.name for path, _ in write_images(tmp_path / "pictures", 5)]

    def write(name: str, labels: list[Any], *header: str) -> Path:
        rows = list(zip(files, labels, strict=False))
        return write_csv(tmp_path / name, [header, *rows] if header else rows)

    return write


def test_the_training_file_decides_what_labels_mean(listed: Callable[..., Path], tmp_path: Path) -> None:
    listed("list.csv", [1, 2, "unknown"])
    listed("few.csv", [1, 2])
    few = {"eval_annotations_file": "few.csv"}
    assert csv_source(tmp_path).classes == ["1", "2", "unknown"]
    assert labels_of(csv_source(tmp_path, False, **few)) == labels_of(csv_source(tmp_path))[:2] == [0, 1]
    listed("list.csv", [0, 1, 2])
    assert labels_of(csv_source(tmp_path, False, **few)) == [1, 2]
    assert labels_of(csv_source(tmp_path, classes=["2", "1", "0"])) == [2, 1, 0]  # by their names
    listed("few.csv", [1, "unknown"])
    with pytest.raises(UserError, match=r"few.csv: line 2: 'unknown' is no number"):
        csv_source(tmp_path, False, **few)


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        ([0, 1, -1], "line 3: label -1, but the 2 classes"),
        ([0, 1, ""], "line 3 has no label"),
        ([0, 1_700_000_000], "a label is 1,700,000,000; are these the numbers of classes"),
    ],
)
def test_a_label_in_a_csv_file_that_is_none_is_told(
    labels: list[Any], told: str, listed: Callable[..., Path], tmp_path: Path
) -> None:
    listed("list.csv", labels)
    with pytest.raises(UserError, match=told):
        csv_source(tmp_path)


def test_a_first_row_that_could_be_an_image_is_never_taken_for_a_header(
    listed: Callable[..., Path], tmp_path: Path
) -> None:
    pictures = tmp_path / "pictures"
    for path in sorted(pictures.iterdir())[:3]:
        path.rename(path.with_suffix(""))
    rows = [("000", "cat"), ("001", "dog"), ("002", "cat")]
    write_csv(tmp_path / "list.csv", rows)
    assert labels_of(csv_source(tmp_path)) == [0, 1, 0]  # no suffix, but it is there
    write_csv(tmp_path / "list.csv", [("file", "label"), *rows])
    named = "line 1: there is no image .*file; if this row is a header, give data.args.image_column"
    with pytest.raises(UserError, match=named):  # no other row has a suffix either
        csv_source(tmp_path)
    assert labels_of(csv_source(tmp_path, image_column="file", label_column="label")) == [0, 1, 0]
    for label in ("cat", "3"):
        others = [("003.png", label if label == "cat" else 0), ("004.png", 1)]
        write_csv(tmp_path / "list.csv", [("lost", label), *others])
        with pytest.raises(UserError, match=r"line 1: there is no image .*lost"):
            csv_source(tmp_path)


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_columns_of_a_csv_file_go_by_name_or_number(
    delimiter: str, listed: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [f"{i}{delimiter}00{i}.png{delimiter}{name}" for i, name in enumerate(CLASSES)]
    with_header = [delimiter.join(("id", "file name", "kind")), *rows]
    (tmp_path / "list.csv").write_text("\n".join(with_header))
    named = csv_source(tmp_path, image_column="file name", label_column="kind")
    assert (named.classes, labels_of(named), named.path(2).name) == (CLASSES, [0, 1, 2], "002.png")
    by_place = csv_source(tmp_path, image_column=1, label_column=2, delimiter=delimiter)
    assert (by_place.classes, labels_of(by_place)) == (CLASSES, [0, 1, 2])
    (tmp_path / "list.csv").write_text("\n".join(rows))
    assert labels_of(csv_source(tmp_path, image_column=1, label_column=2)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ({"image_column": "fil"}, r"data.args.image_column: .* no column 'fil' \(did you mean 'file'\?\)"),
        (
            {"label_column": -1},
            "data.args.label_column: is the name of a column or its number from 0, not -1",
        ),
        ({"label_column": 5}, "list.csv: line 1 has no label"),
        ({"delimiter": "ab"}, "data.args: csv refused"),
    ],
)
def test_a_column_that_is_not_there_is_told(
    args: dict[str, Any], told: str, listed: Callable[..., Path], tmp_path: Path
) -> None:
    listed("list.csv", CLASSES, "file", "label")
    with pytest.raises(UserError, match=told):
        csv_source(tmp_path, **args)


@pytest.mark.parametrize(
    ("kind", "white"),
    [
        (np.uint8, 255), (np.int64, 255), (np.int32, 255), (">i4", 255), (np.uint16, 65535), (">u2", 65535),
        (bool, 1), (np.float16, 1), (np.float64, 1), (">f4", 1), (">f8", 1),
    ],
)  # fmt: skip
def test_arrays_of_every_type_keep_their_shades(kind: Any, white: int, tmp_path: Path) -> None:
    shades = np.tile(np.linspace(0, 1, 6).round(0 if kind is bool else 3), (4, 6, 1))
    x, y = (shades * white).astype(kind), np.arange(4).astype(">i2")
    np.savez(tmp_path / "a.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    setup = config(data={"name": "arrays", "root": str(tmp_path / "a.npz")})
    inputs, targets = everything(data.build(setup).eval_loader(setup, rank()))
    assert np.allclose(inputs[:, 0], shades, atol=1 / 254)
    assert targets.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("array", "told"),
    [
        (np.full((4, 2, 2), 256), "int64 from 256 to 256"),
        (np.full((4, 2, 2), -1, np.int32), "int32 from -1 to -1"),
        (np.full((4, 2, 2), 200, np.uint16), "uint16 from 200 to 200"),
        (np.tile(np.eye(2, dtype=np.int64), (4, 1, 1)), "int64 from 0 to 1"),  # a mask, nearly black by 255
    ],
)
def test_arrays_whose_white_is_not_known_are_refused(array: np.ndarray, told: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x_train=array, y_train=np.arange(4))
    with pytest.raises(UserError, match=f"a.npz: the images are {told}, .* store them as uint8"):
        open_source("arrays", str(tmp_path / "a.npz"), True, {})


def test_a_renamed_array_file_is_read_or_told(npz: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", np.ones((3, 4, 4), np.uint8))
    (tmp_path / "one.npy").rename(tmp_path / "one.npz")
    with pytest.raises(UserError, match=r"data.root: .*one.npz holds one array .* data.args.images"):
        open_source("arrays", str(tmp_path / "one.npz"), True, {})
    npz.rename(tmp_path / "many.npy")
    with pytest.raises(UserError, match=r"data.args: .*many.npy is an .npz file of x_train, .* data.root"):
        open_source("arrays", str(tmp_path), True, {"images": "many.npy", "labels": "many.npy"})
    assert len(open_source("arrays", str(tmp_path / "many.npy"), True, {})) == 90
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as archive:
        archive.writestr("x_train", "text")
        archive.writestr("y_train", "text")
    with pytest.raises(UserError, match=r"other.npz is no NumPy file .*'x_train' is no array"):
        open_source("arrays", str(tmp_path / "other.npz"), True, {})


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (
            np.array([[0], [1], [2]]),
            r"training set, the label of sample 0 has the shape \[1\], .* labels\[:, 0\]",
        ),
        (np.eye(3, dtype=np.int64), r"the label of sample 0 has the shape \[3\], .* labels.argmax\(1\)"),
        (
            np.array([0.0, 1.0, 2.0]),
            "the label of sample 0 is the fraction 0, not the whole number of a class",
        ),
    ],
    ids=["[N, 1]", "one-hot", "fractions"],
)
def test_labels_in_an_npz_file_that_are_no_class_numbers_are_told(
    labels: np.ndarray, told: str, tmp_path: Path
) -> None:
    x = np.zeros((3, 4, 4), np.uint8)
    np.savez(tmp_path / "a.npz", x_train=x, y_train=labels, x_test=x, y_test=labels)
    with pytest.raises(UserError, match=told):
        data.build(config(data={"name": "arrays", "root": str(tmp_path / "a.npz")}))


class Pairs(list[Any]):
    """A data set of one's own."""

    classes = ("a", "b", "c")


def labelled(*labels: Any) -> Pairs:
    return Pairs((torch.zeros(1, 2, 2), label) for label in labels)


def in_memory(*labels: int) -> data.images.InMemory:
    return data.images.InMemory(torch.zeros(len(labels), 1, 2, 2), torch.tensor(labels), ["a", "b", "c"])


def test_a_label_beyond_the_classes_is_told_at_the_start_where_labels_are_at_hand() -> None:
    good, bad = in_memory(0, 1, 2), in_memory(0, 1, 3)
    for sets, part in (((bad, good), "training"), ((good, bad), "evaluation")):
        told = f"in the {part} set, the label of sample 2 is 3, but the 3 classes are numbered from 0"
        with pytest.raises(UserError, match=told):
            data.build(config(), *sets)
    with pytest.raises(UserError, match="sample 2 is 3"):
        data.build(config(data={"target_transform": "one_hot"}), bad, good)
    kept = torch.utils.data.Subset(bad, [0, 1])  # without the bad one
    kept.classes = good.classes  # type: ignore[attr-defined]
    assert len(data.build(config(), kept, good).train) == 2


@pytest.mark.parametrize(
    ("label", "options", "told"),
    [
        (3, {}, "is 3, but the 3 classes"),
        (np.int32(3), {}, "is 3, but the 3 classes"),
        (torch.tensor(-1), {}, "is -1, but the 3 classes"),
        (0.5, {}, "is '0.5' .float., not the whole number"),
        ("a", {}, "is 'a' .str., not the whole number"),
        (torch.tensor([1]), {}, r"has the shape \[1\]"),
        (torch.tensor([1.0, 0.0]), {}, r"has the shape \[2\]"),
        (3, {"target_transform": "one_hot"}, "is 3, but the 3 classes"),
        (1, {"target_transform": "operator:neg"}, "is -1, but the 3 classes"),
        (3, {"task": "mine:Task"}, "is 3, but the 3 classes"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_any_other_label_that_cannot_be_is_told_by_the_loader(
    label: Any, options: dict[str, str], told: str, workers: int
) -> None:
    options = dict(options)
    task = options.pop("task", "classification")
    setup = config(data={"workers": workers, "shuffle": False, **options}, task={"name": task})
    sets = data.build(setup, labelled(*[0] * 9, label), labelled(0))
    with pytest.raises(UserError, match=f"data: the label of sample 9 {told}"):
        for batch in sets.train_loader(setup, rank(), 0, 2):
            batch.to(torch.device("cpu"))


def test_labels_of_any_whole_type_are_class_numbers_and_a_task_of_ones_own_gets_its_own() -> None:
    for label in (1, True, np.uint8(1), np.int32(1), torch.tensor(1, dtype=torch.int32), torch.tensor(True)):
        setup = config(data={"workers": 0})
        sets = data.build(setup, labelled(label, label), labelled(0))
        assert everything(sets.train_loader(setup, rank(), 0, 1))[1].dtype == torch.int64
    setup = config(data={"workers": 0, "shuffle": False}, task={"name": "mine:Task"})
    for label in (-100, 2.5, torch.tensor([4.0, 5.0])):
        sets = data.build(setup, labelled(label), labelled(0))
        assert everything(sets.train_loader(setup, rank(), 0, 1))[1].tolist() == [
            label.tolist() if isinstance(label, torch.Tensor) else label
        ]


def test_what_is_no_map_style_data_set_of_pairs_is_told() -> None:
    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            yield torch.zeros(1, 2, 2), 0

    for source in (Stream(), iter([])):
        with pytest.raises(UserError, match=r"training set \(.*\) has no samples by number; a map-style one"):
            data.build(config(), source, labelled(0))
    with pytest.raises(UserError, match=r"evaluation set \(Stream\)"):
        data.build(config(), labelled(0), Stream())
    with pytest.raises(UserError, match=r"data: sample 0 is a dict, not a pair \(image, label\)"):
        data.build(config(), Pairs([{"image": 1, "label": 0}]), labelled(0))
    named = config(data={"workers": 0}, task={"name": "mine:Task"})
    sets = data.build(named, labelled("cat"), labelled(0))
    with pytest.raises(UserError, match="data: a target is of type str; make it a number"):
        everything(sets.train_loader(named, rank(), 0, 1))


@pytest.mark.parametrize(
    ("shape", "kind", "expected"),
    [
        ((5, 8, 8), np.uint8, (1, 8, 8)),
        ((5, 8, 8, 3), np.uint8, (3, 8, 8)),
        ((5, 3, 8, 8), np.uint8, (3, 8, 8)),
        ((5, 8, 8), np.float64, (1, 8, 8)),
        ((5, 8, 8, 1), np.float32, (1, 8, 8)),
        ((5, 8, 8), np.int32, (1, 8, 8)),
    ],
)
def test_arrays_come_in_several_layouts_and_types(
    shape: tuple[int, ...], kind: type, expected: tuple[int, ...], tmp_path: Path
) -> None:
    y = np.arange(5)
    np.savez(
        tmp_path / "a.npz", x_train=np.ones(shape, kind), y_train=y, x_test=np.ones(shape, kind), y_test=y
    )
    sets = data.build(config(data={"name": "arrays", "root": str(tmp_path / "a.npz")}))
    assert sets.sample_shape == expected
    assert sets.classes == ["0", "1", "2", "3", "4"]
    inputs, targets = everything(sets.train_loader(config(), rank(), 0, 1))
    assert (inputs.dtype, inputs.shape) == (torch.float32, (5, *expected))
    assert (targets.dtype, sorted(targets.tolist())) == (torch.int64, [0, 1, 2, 3, 4])


def test_four_npy_files_do_as_well(tmp_path: Path) -> None:
    names = ("images", "labels", "eval_images", "eval_labels")
    for name, array in zip(names, (*pictures(9), *pictures(4)), strict=True):
        np.save(tmp_path / f"{name}.npy", array)
    given = {"name": "arrays", "root": str(tmp_path), "args": {name: f"{name}.npy" for name in names}}
    sets = data.build(config(data=given))
    assert (len(sets.train), len(sets.eval), sets.sample_shape) == (9, 4, (1, 8, 8))


def test_any_torchvision_class_goes_by_its_name(here: Callable[..., Any], tmp_path: Path) -> None:
    arguments = ["data.args.size=40", "data.args.num_classes=4", "data.args.image_size=[3,8,8]"]
    here(*SMALL, "data.name=FakeData", "data.root=null", *arguments)
    assert "40 training and 40 eval samples" in (tmp_path / "runs/run/log.txt").read_text()
    saved = torch.load(tmp_path / "runs/run/checkpoints/last.pt", weights_only=True)
    assert saved["classes"] == ["0", "1", "2", "3"]
    assert saved["sample_shape"] == [3, 8, 8]


def test_a_torchvision_set_in_memory_is_indexed_batch_by_batch(tmp_path: Path) -> None:
    write_idx(tmp_path / "FashionMNIST" / "raw", 3, gzipped=False)
    source = open_source("FashionMNIST", str(tmp_path), True, {"download": False})
    assert isinstance(source, data.images.InMemory)
    assert source.images.shape == (3, 1, 28, 28)
    assert source.classes[9] == "Ankle boot"


def test_a_torchvision_set_without_class_names_gets_numbers_or_the_names_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Nameless:
        def __init__(self, root: str, split: str) -> None:
            self.split, self.labels = split, np.array([0, 2, 1])

        def __len__(self) -> int:
            return 3

    monkeypatch.setattr(torchvision.datasets, "SVHN", Nameless)
    assert open_source("SVHN", None, True, {}).classes == ["0", "1", "2"]
    assert open_source("SVHN", None, True, {"classes": CLASSES}).classes == CLASSES
    assert [open_source("SVHN", None, train, {}).split for train in (True, False)] == ["train", "test"]
    assert open_source("SVHN", None, False, {"eval_split": "extra"}).split == "extra"


def test_a_data_set_of_ones_own_is_named_by_module_and_object(
    cli: Callable[..., Finished], tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "class Noise(torch.utils.data.Dataset):\n"
        "    classes = ['low', 'high']\n"
        "    def __init__(self, train, count=20):\n"
        "        self.count = count if train else 5\n"
        "    def __len__(self):\n"
        "        return self.count\n"
        "    def __getitem__(self, index):\n"
        "        return torch.rand(1, 4, 4) / 2 + index % 2 / 2, index % 2\n"
    )
    result = cli("train", *SMALL, "data.name=mine:Noise", "data.root=null", "data.args.count=30")
    assert result.rc == 0, result
    assert "30 training and 5 eval samples" in result.err
    saved = torch.load(tmp_path / "runs/run/checkpoints/last.pt", weights_only=True)
    assert saved["classes"] == ["low", "high"]


def test_a_share_of_the_training_set_is_held_out_by_the_seed(image_folder: Path) -> None:
    def split(seed: int) -> tuple[list[int], list[int]]:
        source = {"name": "image_folder", "root": str(image_folder / "train"), "eval_fraction": 0.3}
        sets = data.build(from_mapping({"seed": seed, "train": {"epochs": 1}, "data": source}))
        assert sets.classes == CLASSES
        train, held = sets.train.source.positions, sets.eval.source.positions
        assert train is not None and held is not None
        return train.tolist(), held.tolist()

    train, held = split(0)
    assert (len(held), sorted(train + held)) == (9, list(range(30)))
    assert split(0) == (train, held)
    assert split(1) != (train, held)


def test_sets_with_other_class_names_are_refused(image_folder: Path) -> None:
    train = open_source("image_folder", str(image_folder), True, {})
    other = open_source("image_folder", str(image_folder), False, {})
    other.classes = ["bright", "dim", "striped"]
    with pytest.raises(UserError, match="'dim' is only in the eval set"):
        data.build(config(), train, other)


def test_one_hot_labels_train_to_the_same_weights_as_class_numbers(
    here: Callable[..., Any], small: list[str], tmp_path: Path
) -> None:
    weights = []
    for name, arguments in {"numbers": [], "vectors": ["data.target_transform=one_hot"]}.items():
        assert "eval/accuracy" in here(*small, f"run.name={name}", *arguments).metrics
        saved = torch.load(tmp_path / "runs" / name / "checkpoints/last.pt", weights_only=True)
        weights.append(saved["model"])
    for one, other in zip(weights[0].values(), weights[1].values(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


# --- the order ---------------------------------------------------------------------------------------

LENGTHS, BATCHES, WORLDS, ACCUMULATE = (1, 7, 24, 61), (6, 12), (1, 2, 3), (1, 2)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
def test_every_sample_is_read_once_per_epoch_and_any_world_size_reads_the_same_batches(
    drop_last: bool, shuffle: bool
) -> None:
    for length, batch, accumulate in product(LENGTHS, BATCHES, ACCUMULATE):
        whole = Order(length, batch, seed=3, shuffle=shuffle, drop_last=drop_last)
        per_epoch = whole.steps_per_epoch
        assert per_epoch == (length // batch if drop_last else -(-length // batch))
        for world in WORLDS:
            samplers = [
                DistributedSampler(whole, range(2 * per_epoch), world * accumulate, number, world)
                for number in range(world)
            ]
            parts = [list(sampler) for sampler in samplers]
            assert (
                [len(p) for p in parts] == [len(s) for s in samplers] == [2 * per_epoch * accumulate] * world
            )
            for epoch in range(2):
                seen: list[int] = []
                for step in range(epoch * per_epoch, (epoch + 1) * per_epoch):
                    mine = [part for rank in parts for part in rank if part.step == step]
                    assert {(part.epoch, part.total) for part in mine} == {
                        (epoch, len(whole.global_batch(step)))
                    }
                    read = [int(i) for part in mine for i in part.indices[: part.size]]
                    assert read == whole.global_batch(step).tolist()
                    seen += read
                assert len(set(seen)) == len(seen) == (length // batch * batch if drop_last else length)


def test_the_order_is_a_function_of_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return Order(50, 10, seed=seed).positions(epoch).tolist()

    assert order(0, 0) == order(0, 0)
    assert sorted(order(0, 0)) == list(range(50))
    different = [order(0, 0), order(0, 1), order(1, 0), list(range(50))]
    assert all(one != other for i, one in enumerate(different) for other in different[:i])
    # Written down, so that a run of an earlier version goes on with the same order.
    assert Order(8, 8, seed=0).positions(0).tolist() == [3, 2, 5, 7, 1, 0, 4, 6]


def test_a_run_goes_on_in_mid_epoch_with_the_batches_that_are_left() -> None:
    whole = list(DistributedSampler(Order(61, 12), range(14), parts=2))
    rest = list(DistributedSampler(Order(61, 12), range(8, 14), parts=2))
    assert [part.indices.tolist() for part in rest] == [part.indices.tolist() for part in whole[16:]]


def test_a_rank_that_a_short_batch_leaves_nothing_still_has_a_sample_of_no_weight() -> None:
    parts = Order(1, 4).parts(0, 2)
    assert [(part.size, len(part.indices), part.total) for part in parts] == [(1, 1, 1), (0, 1, 1)]


def test_an_evaluation_reads_every_sample_once() -> None:
    for length, batch, world in product((0, 1, 5, 37), (1, 4, 100), (1, 2, 3, 7)):
        samplers = [EvalSampler(length, batch, number, world) for number in range(world)]
        batches = [list(sampler) for sampler in samplers]
        assert [len(b) for b in batches] == [len(s) for s in samplers]
        read = [int(i) for rank in batches for part in rank for i in part.indices]
        assert read == list(range(length))
        assert all(len(part.indices) <= batch for rank in batches for part in rank)


# --- fetching ----------------------------------------------------------------------------------------


def test_workers_fetch_the_same_batches_as_the_process_itself(image_folder: Path) -> None:
    source = {"name": "image_folder", "root": str(image_folder), "train_transform": ["RandomHorizontalFlip"]}
    fetched = []
    for workers in (0, 2):
        setup = config(data=source | {"workers": workers})
        fetched.append(everything(data.build(setup).train_loader(setup, rank(), 0, 8)))
    for one, other in zip(*fetched, strict=True):
        assert torch.equal(one, other)


def test_sets_in_memory_need_no_workers_and_files_share_the_cpus(
    npz: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def workers(**source: Any) -> int:
        setup = config(data=source)
        return loader.workers(data.build(setup).train, setup, rank())

    monkeypatch.setattr(loader, "allowed_cpus", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert workers(name="arrays", root=str(npz)) == 0
    assert workers(name="arrays", root=str(npz), workers=1) == 1
    assert workers(name="image_folder", root=str(image_folder)) == 4
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)  # one is left alone
    assert workers(name="arrays", root=str(npz)) == 1


def test_a_batch_fetched_at_once_is_the_same_as_sample_by_sample(npz: Path) -> None:
    source = {"name": "arrays", "root": str(npz), "mean": [0.3], "std": [0.2], "target_transform": "one_hot"}
    source |= {"eval_transform": [{"Resize": {"size": [6, 6]}}], "eval_fraction": 0.2}
    samples = data.build(config(data=source)).train
    parts = list(DistributedSampler(Order(len(samples), 8), range(3)))
    for part, batch in zip(parts, samples.batches(parts), strict=True):
        assert batch.part is part and len(batch.inputs) == len(batch.targets) == 8
        for row, index in enumerate(part.indices.tolist()):
            image, target = samples.sample(index, epoch=0)
            assert torch.allclose(batch.inputs[row], image, atol=1e-6)
            assert torch.equal(batch.targets[row], target)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_the_same_bits_from_whichever_step_a_run_goes_on(
    workers: int, npz: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several are fetched at a time: which ones come together depends on where the run starts."""
    source = {"name": "arrays", "root": str(npz), "mean": [0.3], "std": [0.2], "workers": workers}
    setup = config(
        data=source | {"train_transform": [{"Resize": {"size": [13, 9]}}], "shuffle": True},
        train={"batch_size": 16, "accumulate": 2, "epochs": 3},
    )
    sets = data.build(setup)
    monkeypatch.setattr(loader, "FETCH_BYTES", 3 * 8 * 13 * 9 * 4)  # three micro-batches
    total = sets.total_steps(setup)
    whole = list(sets.train_loader(setup, rank(), 0, total))
    rest = list(sets.train_loader(setup, rank(), 4, total))
    assert len(whole) == 2 * total and len(rest) == 2 * (total - 4)
    for one, other in zip(whole[8:], rest, strict=True):
        assert one.part.step == other.part.step and one.part.indices.tolist() == other.part.indices.tolist()
        assert torch.equal(one.inputs, other.inputs) and torch.equal(one.targets, other.targets)


def test_data_is_fetched_fully_when_a_set_gives_a_pil_image_or_an_array() -> None:
    class Mixed(torch.utils.data.Dataset[Any]):
        classes = CLASSES

        def __len__(self) -> int:
            return 6

        def __getitem__(self, index: int) -> tuple[Any, int]:
            image = pictures(3)[0][index % 3]
            return (
                image if index % 2 else torchvision.transforms.v2.functional.to_pil_image(image)
            ), index % 3

    sets = data.build(config(data={"workers": 0}), Mixed(), Mixed())
    inputs, _ = everything(sets.eval_loader(config(data={"workers": 0}), rank()))
    assert (inputs.shape, inputs.dtype) == ((6, 1, 8, 8), torch.float32)
    assert float(inputs.min()) >= 0 and float(inputs.max()) <= 1
