"""Fine-tuning: weights to begin with, frozen weights, and images as pretrained weights had them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from dist_train import checkpoint, fit, load, models, runtime
from dist_train.config import Config, UserError, from_mapping
from dist_train.data import eval_transform
from dist_train.models import pretrained, weights
from dist_train.models.freeze import Frozen, frozen
from dist_train.predict import evaluate_run
from dist_train.tools.dryrun import DryRun
from dist_train.tools.replay import replay
from tests.worlds import SMALL, pictures, write_npz

CNN = ["model.name=cnn", "model.args={widths: [4, 8], dropout: 0.2}", "eval.every=4"]
BUT_THE_HEAD = "model.freeze=['*', '!13']"
ADAMW = ["optim.name=AdamW", "optim.lr=0.01", "optim.args.weight_decay=0.1"]


def state(run: Path, name: str = "last.pt") -> dict[str, Any]:
    """What a checkpoint of a run holds."""
    return checkpoint.load(run / "checkpoints" / name)


def moved(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    """The names of the tensors that differ."""
    return {name for name, value in one.items() if not torch.equal(value, other[name])}


# --- frozen weights ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patterns", "free"),
    [
        (["0", "1"], {"3", "5", "7", "8", "13"}),
        (["*", "!13"], {"13"}),
        (["*", "!13.weight"], {"13"}),
        (["?", "!5"], {"5", "13"}),
    ],
)
def test_patterns_name_layers_or_weights_and_a_later_one_takes_back(
    patterns: list[str], free: set[str]
) -> None:
    model = models.build("cnn", {"widths": [4, 8]}, (1, 8, 8), 3)
    names = frozen(model, patterns)
    assert {name.partition(".")[0] for name, _ in model.named_parameters() if name not in names} == free


def test_a_pattern_reaches_layers_within_layers_and_their_batchnorm() -> None:
    model = models.build("resnet18", {}, (3, 32, 32), 3)
    held = Frozen(model, ["conv1", "bn1", "layer[12]"], None)
    trained = {name.partition(".")[0] for name, w in model.named_parameters() if w.requires_grad}
    assert trained == {"layer3", "layer4", "fc"}
    model.train()
    held.set(0)
    still = {name.partition(".")[0] for name, m in model.named_modules() if name and not m.training}
    assert still == {"bn1", "layer1", "layer2"}  # in the layers, the BatchNorms alone
    assert len(held.norms) == 1 + 4 + 5 and all(isinstance(norm, nn.BatchNorm2d) for norm in held.norms)


def test_what_cannot_be_frozen_is_told() -> None:
    model = models.build("cnn", {"widths": [4, 8]}, (1, 8, 8), 3)
    with pytest.raises(
        UserError, match=r"model.freeze: no layer or weight is named like '13.wieght' \(did you"
    ):
        frozen(model, ["13.wieght"])
    with pytest.raises(UserError, match=r"nothing to train; take some back, as by '!13'"):
        frozen(model, ["*"])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"freeze_until": 5}, "'model.freeze' names nothing to freeze"),
        ({"freeze": ["0"], "freeze_until": "2 minutes"}, "counts in steps or epochs"),
        ({"freeze": ["0"], "freeze_until": "never"}, "a step or an epoch at least, not 'never'"),
        ({"freeze": ["0"], "freeze_until": "soon"}, "is written as 500"),
    ],
)
def test_how_long_to_freeze_is_checked_at_the_start(words: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        from_mapping({"train": {"epochs": 1}, "model": words})


def test_frozen_weights_and_their_averages_stay_as_they_are_and_all_others_move(
    here: Callable[..., Any], small: list[str], tmp_path: Path
) -> None:
    """Also with momentum, weight decay and a moving average; the mode holds after an evaluation."""
    words = [*small, *CNN, "optim.args={momentum: 0.9, weight_decay: 0.1}", "train.ema=0.9"]
    here(*words, "train.steps=1", "optim.lr=0", "run.name=first")
    first = state(tmp_path / "runs/first")["model"]
    here(*words, BUT_THE_HEAD)
    end = state(tmp_path / "runs/run")
    counters = {f"{layer}.{name}" for layer in (1, 5, 8) for name in ("running_mean", "running_var")}
    began = {name: value for name, value in first.items() if "num_batches" not in name}
    assert moved(began, end["model"]) == {"13.weight", "13.bias"} | counters  # the first run's own averages
    assert torch.equal(end["model"]["1.running_mean"], torch.zeros(4))
    assert end["model"]["1.num_batches_tracked"] == 0
    assert moved(end["average"], end["model"]) == {"13.weight", "13.bias"}
    assert len(end["optimizer"]["state"]) == 2


@pytest.mark.parametrize("words", [["--allow-changes"], ["run.name=other", "resume=runs/run"]])
def test_state_of_the_optimizer_is_not_given_to_other_weights(
    words: list[str], here: Callable[..., Any], small: list[str]
) -> None:
    mlp = [*small, "model.name=mlp", "model.args={hidden: [4, 4]}", "optim.args.momentum=0.9"]
    here(*mlp, "train.steps=1", "model.freeze=['1']")
    with pytest.raises(UserError, match=r"model.freeze leaves other weights to the optimizer now"):
        changed = [*mlp, "train.steps=2", "model.freeze=['5']", *(w for w in words if "=" in w)]
        fit(load([], changed), allow_changes="--allow-changes" in words)


def test_weights_are_frozen_up_to_a_step_and_trained_from_there_on(
    here: Callable[..., Any], small: list[str], tmp_path: Path
) -> None:
    """Neither decay nor moments touch them before; an epoch is 6 steps."""
    words = [*small, *CNN, *ADAMW, BUT_THE_HEAD, "checkpoint.every=3", "checkpoint.keep=9"]
    here(*words, "model.freeze_until=1 epoch")
    three, six, nine = (state(tmp_path / "runs/run", f"step-0000000{n}.pt") for n in (3, 6, 9))
    assert moved(three["model"], six["model"]) == {"13.weight", "13.bias"}
    assert [len(saved["optimizer"]["state"]) for saved in (three, six, nine)] == [2, 2, len(weights_of(six))]
    assert moved(six["model"], nine["model"]) == set(six["model"])
    steps = {float(values["step"]) for values in nine["optimizer"]["state"].values()}
    assert steps == {3.0, 9.0}


def weights_of(saved: dict[str, Any]) -> list[str]:
    """The names of the weights in a checkpoint, without buffers."""
    return [name for name in saved["model"] if "running" not in name and "num_batches" not in name]


# --- weights to begin with -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose best checkpoint is not its last one, with a moving average."""
    folder = tmp_path_factory.mktemp("made")
    words = [
        *SMALL,
        *CNN,
        f"data.root={write_npz(folder)}",
        f"run.dir={folder}",
        "run.name=before",
        "threads=1",
    ]
    run = fit(load([], [*words, "train.ema=0.5", "seed=1", "checkpoint.best=min eval/loss"])).folder
    assert state(run, "best.pt")["step"] < 12
    return run


@pytest.fixture
def before(made: Path, tmp_path: Path) -> Path:
    """A copy of it, as runs/before."""
    return Path(shutil.copytree(made, tmp_path / "runs/before", symlinks=True))


class Freezing(nn.Module):
    """A model that stops to train its first layer by itself, after some batches."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Linear(4, 3))
        self.seen = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen += self.training
        self.layers[1].requires_grad_(self.seen < 8)
        return self.layers(images)


def test_a_model_that_changes_by_itself_what_is_trained_is_told_and_nothing_false_is_saved(
    here: Callable[..., Any], small: list[str], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"changed by itself whether layers.1.bias is trained .*model.freeze"):
        here(*small, "checkpoint.every=5", model=Freezing())
    saved = sorted(path.name for path in (tmp_path / "runs/run/checkpoints").glob("step-*.pt"))
    assert saved == ["step-00000005.pt", "step-00000006.pt"]  # the second one is the best


STILL = ["train.steps=1", "optim.lr=0", "model.freeze=['*', '!13']", "model.args.dropout=0"]


def test_a_run_begins_with_the_evaluated_weights_of_anothers_best_checkpoint(
    here: Callable[..., Any], small: list[str], before: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = state(before, "best.pt")
    result = here(*small, *CNN, *STILL, f"model.init={before}", "train.ema=0.9")
    assert result.step == 1  # a training of its own, from step 0
    begun = state(result.folder)
    assert not moved(best["average"], begun["model"]) and not moved(best["average"], begun["average"])
    assert result.metrics == pytest.approx(best["metrics"])
    assert f"begins with the weights of {before} (best.pt)" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["safetensors", "state_dict", "nested", "checkpoint", "url"])
def test_weights_are_read_from_files_of_all_kinds(
    kind: str, here: Callable[..., Any], small: list[str], before: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    tensors, file = state(before, "best.pt")["average"], tmp_path / "weights-0123.pt"
    place = str(file)
    if kind == "safetensors":
        place = str(file := file.with_suffix(".safetensors"))
        save_file(tensors, file)
    elif kind == "checkpoint":
        place = str(before / "checkpoints/best.pt")
    else:
        wrapped = {f"module.{name}": value for name, value in tensors.items()}  # as DDP names them
        torch.save({"state_dict": wrapped, "epoch": 3} if kind == "nested" else tensors, file)
    if kind == "url":
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
        place = file.as_uri()
    result = here(*small, *CNN, *STILL, f"model.init={place}")
    assert not moved(tensors, state(result.folder)["model"])
    if kind == "url":  # it is in torch's cache, and fetched once
        assert [p.name.partition("-")[2] for p in (tmp_path / "cache/hub/checkpoints").iterdir()] == [
            file.name
        ]
        file.unlink()
        assert weights.first(config_of(run={"name": "other"}, model={"init": place}))


def test_weights_cut_off_anywhere_are_told(before: Path, tmp_path: Path) -> None:
    whole = (before / "checkpoints/best.pt").read_bytes()
    for share in (3, 2, 1.01):
        (tmp_path / "cut.pt").write_bytes(whole[: int(len(whole) / share)])
        with pytest.raises(UserError, match=r"model.init: .*cut.pt: .*damaged"):
            weights.first(config_of(run={"name": "other"}, model={"init": str(tmp_path / "cut.pt")}))


def test_a_dry_run_begins_with_the_first_weights_also_where_the_run_is_there(
    here: Callable[..., Any], small: list[str], before: Path
) -> None:
    words = [*small, *CNN, *STILL, f"model.init={before}"]
    here(*words)
    config = load([], words)
    ranks = runtime.start(config)
    try:
        assert "begins with the weights of" in DryRun(config, ranks).learner.begins
    finally:
        runtime.stop(ranks.accelerator)


def test_a_head_of_another_size_is_new_and_told_by_name(
    here: Callable[..., Any], small: list[str], before: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, _ = pictures(20)
    np.savez("five.npz", x_train=images, y_train=np.arange(20) % 5, x_test=images, y_test=np.arange(20) % 5)
    result = here(*small, *CNN, *STILL, f"model.init={before}", "data.root=five.npz")
    best, begun = state(before, "best.pt")["average"], state(result.folder)["model"]
    assert begun["13.weight"].shape == (5, 72)
    assert {n for n, v in best.items() if not torch.equal(v, begun[n])} == {"13.weight", "13.bias"}
    said = " ".join(capsys.readouterr().err.split())
    assert "13.weight is new: [5, 72] instead of [3, 72]; 13.bias is new: [5] instead of [3]" in said


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["model.args.widths=[6, 8]"],
            r"its 0.weight is \[4, 1, 4, 4\], the model's \[6, 1, 4, 4\], and 5 more like this",
        ),
        (["model.args.widths=[4, 8, 8]"], "does not fit the model"),
        (["model.init=nowhere"], "model.init: nowhere: there is no such run or checkpoint file"),
        (["model.init=arrays.npz"], "model.init: arrays.npz"),
        (["model.init=empty.pt"], "model.init: empty.pt: holds no weights"),
        (["model.init=half.safetensors"], "model.init: half.safetensors: damaged, or no safetensors file"),
        (
            ["model.init=file:///no/such/weights.pt"],
            "model.init: file:///no/such/weights.pt can't be fetched",
        ),
        (["resume=runs/before"], "'model.init' and 'resume' both name what the run begins with"),
    ],
)
def test_what_does_not_fit_or_is_not_there_is_told_in_a_sentence(
    words: list[str], told: str, here: Callable[..., Any], small: list[str], tmp_path: Path, before: Path
) -> None:
    torch.save({"step": 3}, tmp_path / "empty.pt")
    (tmp_path / "half.safetensors").write_bytes((before / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(UserError, match=told) as caught:
        here(*small, *CNN, f"model.init={before}", *words)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs/run").exists()


def test_the_first_weights_belong_to_the_run_whatever_becomes_of_where_they_came_from(
    here: Callable[..., Any], small: list[str], before: Path, tmp_path: Path
) -> None:
    words = [*small, *CNN, f"model.init={before}", "model.freeze=['0']", "model.freeze_until=2"]
    straight = here(*words, "run.name=straight")

    def stop(row: dict[str, Any]) -> bool:
        raise KeyboardInterrupt  # after the first row, ahead of the first checkpoint

    with pytest.raises(KeyboardInterrupt):
        here(*words, "checkpoint.every=never", on_row=stop)
    run = tmp_path / "runs/run"
    assert not checkpoint.newest_first(run / "checkpoints")
    before.rename(tmp_path / "elsewhere")
    gone_on = here(*words)  # once more from step 0, from the run's own copy
    one, other = state(straight.folder), state(gone_on.folder)
    assert not moved(one["model"], other["model"]) and one["metrics"] == other["metrics"]
    # With a checkpoint nothing else is read.
    (run / weights.COPY).unlink()
    assert here(*words, "train.steps=14").step == 14
    replayed = [replay(straight.folder, step) for step in (1, 3)]  # before and after the switch
    assert replayed[0].start == "the initial weights"
    assert {len(each.gradients) for each in replayed} == {len(weights_of(one))}
    assert replayed[0].gradients["0.weight"] == 0 < replayed[1].gradients["0.weight"]
    (straight.folder / weights.COPY).unlink()
    with pytest.raises(UserError, match="the weights that the run began with are missing"):
        replay(straight.folder, 1)


# --- images as pretrained weights had them -------------------------------------------------------


def config_of(**sections: Any) -> Config:
    """A configuration of some sections."""
    return from_mapping({"train": {"steps": 1}, **sections})


def picture(channels: int = 3) -> tuple[torch.Tensor, Image.Image]:
    """A smooth image uint8 `[C, 120, 160]`, and the same as Pillow's in colors."""
    down, right = torch.meshgrid(torch.arange(120), torch.arange(160), indexing="ij")
    waves = [127 + 100 * torch.sin(down / (9 + c)) * torch.cos(right / (7 + c)) for c in range(channels)]
    image = torch.stack(waves).to(torch.uint8)
    return image, Image.fromarray(image.expand(3, -1, -1).permute(1, 2, 0).numpy())


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "lraspp_mobilenet_v3_large"])
def test_images_are_those_of_torchvisions_weights(name: str, channels: int) -> None:
    config = pretrained.with_own_transforms(config_of(model={"name": name, "args": {"weights": "DEFAULT"}}))
    image, same = picture(channels)
    theirs = torchvision.models.get_model_weights(name)["DEFAULT"].transforms()(same)
    torch.testing.assert_close(eval_transform(config)(image), theirs, atol=0.04, rtol=0)  # two shades of 255
    assert pretrained.with_own_transforms(config) == config  # a run that goes on has the same


def test_what_the_configuration_says_of_images_goes_before_what_weights_had() -> None:
    model = {"name": "resnet18", "args": {"weights": "DEFAULT"}}
    data = {"eval_transform": [{"Resize": {"size": 32}}]}
    config = pretrained.with_own_transforms(config_of(model=model, data=data))
    assert config.data.eval_transform == data["eval_transform"]
    assert config.data.mean == [0.485, 0.456, 0.406]
    (said,) = pretrained.described(config)
    assert said.startswith("images are not those of the weights ResNet18_Weights.IMAGENET1K_V1: data.eval_tr")
    plain = config_of(model={"name": "resnet18"})
    assert pretrained.with_own_transforms(plain) is plain and not pretrained.described(plain)


def test_pretrained_weights_of_torchvision_are_trained_on_with_their_images(
    here: Callable[..., Any], small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """From torch's cache, in which the file lies as if it had been downloaded."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    cache = tmp_path / "cache/hub/checkpoints"
    cache.mkdir(parents=True)
    theirs = torchvision.models.squeezenet1_1().state_dict()
    torch.save(theirs, cache / torchvision.models.SqueezeNet1_1_Weights.DEFAULT.url.rpartition("/")[2])
    images, labels = pictures(3)
    np.savez("few.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    words = [*small, "data.root=few.npz", "model.name=squeezenet1_1", "model.args={weights: DEFAULT}"]
    result = here(*words, "train.batch_size=3", "train.steps=1", "optim.lr=0")
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "images as the weights SqueezeNet1_1_Weights.IMAGENET1K_V1 had them: RGB, Resize(size=256), " in said
    )
    saved = state(result.folder)
    assert saved["sample_shape"] == [3, 224, 224]
    assert saved["config"]["data"]["mean"] == [0.485, 0.456, 0.406]
    assert torch.equal(saved["model"]["features.0.weight"], theirs["features.0.weight"])
    assert evaluate_run(result.folder) == result.metrics


def test_images_are_those_of_timms_weights() -> None:
    import timm
    from timm.data import create_transform, resolve_data_config

    image, same = picture()
    for name in ("resnet18.a1_in1k", "vit_tiny_patch16_224", "efficientvit_l2.r384_in1k"):
        model = {"name": f"timm/{name}", "args": {"pretrained": True}}
        config = pretrained.with_own_transforms(config_of(model=model))
        known = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
        theirs = create_transform(**known)(same)
        torch.testing.assert_close(eval_transform(config)(image), theirs, atol=0.04, rtol=0)
