"""Models by name, fitted to the images and the classes of the data."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.regnet import BlockParams

from dist_train import models
from dist_train.config import UserError
from dist_train.predict import evaluate_run
from tests.processes import Finished, one_after_the_other
from tests.worlds import SMALL, write_npz

CLASSIFIERS = torchvision.models.list_models(module=torchvision.models)


def size_for(name: str) -> int:
    """The side of the images: some classifiers don't take small ones."""
    return 299 if name.startswith("inception") else 224


@pytest.fixture
def regnets(monkeypatch: pytest.MonkeyPatch) -> None:
    """RegNets compute their widths with tensors; these must have values, on the meta device too."""
    original = BlockParams.from_init_params

    def with_values(**arguments: Any) -> BlockParams:
        with torch.device("cpu"):
            return original(**arguments)

    monkeypatch.setattr(BlockParams, "from_init_params", with_values)


@pytest.mark.nightly
@pytest.mark.usefixtures("regnets")
@pytest.mark.parametrize(("channels", "names"), [(1, CLASSIFIERS), (3, CLASSIFIERS[::5])], ids=["1", "3"])
def test_every_classifier_of_torchvision_takes_our_channels_and_gives_our_classes(
    channels: int, names: list[str]
) -> None:
    """In short: the test below."""
    assert len(CLASSIFIERS) > 75
    check_shapes(names, channels)


@pytest.mark.long
@pytest.mark.usefixtures("regnets")
def test_a_classifier_of_each_family_takes_our_channels_and_gives_our_classes() -> None:
    families = {re.match("[a-z]+", name)[0]: name for name in reversed(CLASSIFIERS)}  # type: ignore[index]
    assert len(families) > 15
    check_shapes(list(families.values()), 1)


def check_shapes(names: list[str], channels: int) -> None:
    """Classifiers of 7 classes, built without values, give as many scores."""
    for name in names:
        size = size_for(name)
        with torch.device("meta"), torch.no_grad():
            model = models.build(name, {}, (channels, size, size), 7).eval()
            output = model(torch.zeros(1, channels, size, size))
        assert output.shape == (1, 7), name


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "squeezenet1_0", "googlenet", "vit_b_16"])
def test_classifiers_of_torchvision_learn_on_grey_images_of_their_own_size(name: str) -> None:
    size = 32 if name.startswith("vit") else 64
    torch.manual_seed(0)
    model = models.build(name, {}, (1, size, size), 4)
    images = torch.rand(4, 1, size, size)
    loss = nn.functional.cross_entropy(model(images), torch.arange(4))
    loss.backward()
    missing = [key for key, weight in model.named_parameters() if weight.grad is None]
    assert not missing
    assert torch.isfinite(loss)


def test_the_first_convolution_answers_a_grey_image_as_it_answered_three_equal_channels() -> None:
    model = nn.Sequential(nn.Conv2d(3, 5, 3))
    image = torch.rand(2, 1, 8, 8)
    before = model(image.expand(2, 3, 8, 8))
    models.replace_first(model, 1)
    assert model[0].in_channels == 1
    assert torch.allclose(model(image), before, atol=1e-5)


def test_the_last_layer_is_made_anew_for_pretrained_weights() -> None:
    model = torchvision.models.mobilenet_v3_small()
    models.replace_last(model, 5)
    assert model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 5)


def test_the_mlp_is_the_one_of_the_tutorial() -> None:
    layers = [str(layer) for layer in models.build("mlp", {}, (1, 28, 28), 10)]
    assert layers == [
        "Flatten(start_dim=1, end_dim=-1)",
        "Linear(in_features=784, out_features=512, bias=True)",
        "ReLU()",
        "Linear(in_features=512, out_features=512, bias=True)",
        "ReLU()",
        "Linear(in_features=512, out_features=10, bias=True)",
    ]
    assert "Dropout(p=0.5, inplace=False)" in map(str, models.build("mlp", {"dropout": 0.5}, (1, 4, 4), 2))


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (4, 9, 17)])
def test_our_models_for_images_take_images_of_any_shape(shape: tuple[int, int, int]) -> None:
    for name in models.MODELS.keys() - {"gpt"}:  # which reads symbols
        model = models.build(name, {}, shape, 6)
        each_pixel = shape[1:] if name == "unet" else ()
        assert model(torch.zeros(2, *shape)).shape == (2, 6, *each_pixel), name


def test_a_model_of_ones_own_gets_what_its_signature_asks_for(
    here: Callable[..., Any], npz: Path, tmp_path: Path
) -> None:
    (tmp_path / "my_net.py").write_text(
        "import torch\n"
        "def net(num_classes, in_channels, width=3):\n"
        "    return torch.nn.Sequential(torch.nn.Conv2d(in_channels, width, 3), torch.nn.Flatten(),\n"
        "                               torch.nn.Linear(width * 36, num_classes))\n"
    )
    result = here(*SMALL, "model.name=my_net:net", "model.args.width=5", "train.steps=4")
    weights = torch.load(tmp_path / "runs/run/checkpoints/last.pt", weights_only=True)["model"]
    assert weights["0.weight"].shape == (5, 1, 3, 3)
    assert weights["2.weight"].shape == (3, 180)
    assert evaluate_run("runs/run", trust=True) == result.metrics


@pytest.mark.parametrize(
    ("name", "args", "told"),
    [
        ("MLP", {}, "'mlp'?"),
        ("resnet_18", {}, "'resnet18'?"),
        ("cnn", {"width": [8]}, "model.args.width: cnn has no such argument (did you mean 'widths'?)"),
        ("resnet18", {"zero_init_residul": True}, "zero_init_residul"),
        ("timm/resnet18x", {}, "timm"),
    ],
)
def test_what_cannot_be_built_is_told(name: str, args: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError) as caught:
        models.build(name, args, (1, 64, 64), 3)
    assert told in str(caught.value)


def test_images_too_small_for_a_model_are_told_with_their_shape() -> None:
    model = models.build("cnn", {"widths": [4, 4, 4, 4]}, (1, 8, 8), 3)
    with pytest.raises(UserError, match=r"'cnn' can't take images of shape \[1, 8, 8\]"):
        models.probe(model, torch.zeros(2, 1, 8, 8), "cnn")
    assert model.training  # left as it was


def test_a_mirrored_cnn_gives_in_evaluation_the_same_for_an_image_and_its_mirror_image() -> None:
    torch.manual_seed(0)
    plain, mirrored = (models.build("cnn", {"widths": [4, 8], "mirror": m}, (3, 8, 8), 5) for m in (0, 1))
    mirrored.load_state_dict(plain.state_dict())
    images = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(plain(images), mirrored(images))  # in training
        plain.eval(), mirrored.eval()
        outputs = mirrored(images)
        assert torch.allclose(outputs, (plain(images) + plain(images.flip(-1))) / 2)
        assert torch.allclose(outputs, mirrored(images.flip(-1)))
        assert not torch.allclose(outputs, plain(images), atol=1e-3)


def test_nine_means_of_nine_numbers_are_these() -> None:
    for side in (3, 7):
        images = torch.randn(2, 4, side, side).to(memory_format=torch.channels_last)
        pool = models.build("cnn", {"widths": [4]}, (1, 2 * side, 2 * side), 5)[3]
        assert torch.equal(pool(images), nn.functional.adaptive_avg_pool2d(images, 3))


def test_a_cnn_with_shifts_gives_in_evaluation_the_mean_for_the_image_and_for_it_moved() -> None:
    torch.manual_seed(0)
    args = {"widths": [4, 8], "mirror": True}
    plain, shifted = (models.build("cnn", {**args, "shift": s}, (3, 8, 8), 5).eval() for s in (0, 1))
    shifted.load_state_dict(plain.state_dict())
    images = torch.randn(4, 3, 10, 10)
    # Of images whose edge is repeated, moving them is looking at another part of a larger one.
    images[..., [0, -1], :], images[..., [0, -1]] = images[..., [1, -2], :], images[..., [1, -2]]
    up, down, left, right = images[..., 2:, 1:-1], images[..., :-2, 1:-1], images[..., 2:], images[..., :-2]
    middle = images[..., 1:-1, 1:-1]
    with torch.no_grad():
        wanted = sum(plain(part) for part in (middle, up, down, left[..., 1:-1, :], right[..., 1:-1, :])) / 5
        assert torch.allclose(shifted(middle), wanted, atol=1e-6)
        assert not torch.allclose(plain(middle), wanted, atol=1e-3)
    with pytest.raises(UserError, match="shift is a number of pixels from 0 on, not -1"):
        models.build("cnn", {"shift": -1}, (3, 8, 8), 5)


# --- the summary -------------------------------------------------------------------------------------


def summary(result: Finished) -> tuple[list[list[str]], dict[str, str]]:
    """The rows of the table of layers, and the totals below."""
    assert result.rc == 0, result
    table, totals = result.out.split("\n\n")
    rows = [re.split(r"\s{2,}", line.strip()) for line in table.splitlines()]
    return rows, dict(re.split(r"\s{2,}", line, maxsplit=1) for line in totals.splitlines())  # type: ignore[misc]


@pytest.fixture(scope="module")
def summaries(tmp_path_factory: pytest.TempPathFactory) -> list[Finished]:
    """Of a small MLP, of a ResNet-50 for pictures, and of a model that computes its sizes."""
    folder = tmp_path_factory.mktemp("summaries")
    write_npz(folder)
    fake = ["data.name=FakeData", "data.root=null", "data.args.num_classes=3"]
    jobs = [
        ["model.args.hidden=[16]"],
        [*fake, "data.args.image_size=[3,224,224]", "model.name=resnet50"],
        [*fake, "data.args.image_size=[1,32,32]", "model.name=regnet_y_400mf"],
    ]
    return one_after_the_other([(folder, ["summary", *SMALL, *words]) for words in jobs])


def test_the_summary_counts_parameters_and_multiply_adds(summaries: list[Finished]) -> None:
    rows, totals = summary(summaries[0])
    assert rows == [
        ["layer", "type", "output", "parameters"],
        ["0", "Flatten", "64", "0"],
        ["1", "Linear", "16", "1,040"],
        ["2", "ReLU", "16", "0"],
        ["3", "Linear", "3", "51"],
    ]
    assert totals["input"] == "1 x 8 x 8"
    assert totals["parameters"].startswith("1,091 (1,091 trainable")
    assert totals["multiply-adds"] == f"{64 * 16 + 16 * 3:,} per sample"


def test_the_summary_of_a_resnet_agrees_with_the_published_figures(summaries: list[Finished]) -> None:
    rows, totals = summary(summaries[1])
    expected = torchvision.models.ResNet50_Weights.IMAGENET1K_V2.value.meta
    removed = 997 * 2049  # the outputs that 3 classes don't have
    assert totals["parameters"].startswith(f"{expected['num_params'] - removed:,} ")
    adds = float(totals["multiply-adds"].split()[0].replace(",", ""))
    assert adds / 1e9 == pytest.approx(expected["_ops"], rel=1e-2)
    assert rows[1][:3] == ["conv1", "Conv2d", "64 x 112 x 112"]
    assert rows[-1] == ["fc", "Linear", "3", f"{2048 * 3 + 3:,}"]


def test_the_summary_knows_models_that_compute_their_sizes(summaries: list[Finished]) -> None:
    _, totals = summary(summaries[2])
    expected = torchvision.models.RegNet_Y_400MF_Weights.IMAGENET1K_V1.value.meta["num_params"]
    expected -= 997 * 441 + 2 * 9 * 32  # 3 classes and 1 channel
    assert totals["parameters"].startswith(f"{expected:,} ")
