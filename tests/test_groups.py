"""Groups of weights: no decay, rates of their own, a rate for each layer; optimizers of other packages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from dist_train import optim
from dist_train.config import UserError, from_mapping
from dist_train.models import mlp
from dist_train.models.cnn import cnn
from dist_train.models.gpt import GPT
from dist_train.optim.groups import layers
from dist_train.record.history import read_attempts
from tests.distributed.ranks import equal, last, same_bits
from tests.worlds import SMALL


def build(model: nn.Module, **section: Any) -> torch.optim.Optimizer:
    """The optimizer of `model` that a section `optim` asks for."""
    return optim.build(from_mapping({"optim": {"lr": 1.0, **section}, "train": {"steps": 1}}), model)


def options(model: nn.Module, optimizer: torch.optim.Optimizer, option: str) -> dict[str, Any]:
    """An option of the optimizer by the name of the weight."""
    by_weight = {w: group[option] for group in optimizer.param_groups for w in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(by_weight)
    return {name: by_weight[weight] for name, weight in model.named_parameters()}


def moved(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """By how much of its size each weight, made 1 before, shrinks in a step without any gradient."""
    for weight in model.parameters():
        weight.data.fill_(1.0)
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    return {name: round(1 - weight.mean().item(), 6) for name, weight in model.named_parameters()}


# --- weight decay ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Muon"])
def test_weights_without_decay_are_left_alone_where_there_is_no_gradient(name: str) -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 3))
    args: dict[str, Any] = {"weight_decay": 0.1}
    if name == "Muon":
        args["rest"] = {"AdamW": {"weight_decay": 0.1}}
    decayed = {n for n, share in moved(model, build(model, name=name, args=args)).items() if share}
    assert decayed == set(dict(model.named_parameters()))
    kept = build(model, name=name, args=args, no_decay=["norms", "biases"])
    assert {n for n, share in moved(model, kept).items() if share} == {"0.weight", "2.weight", "3.weight"}
    more = build(model, name=name, args=args, no_decay=["norms", "biases", "embeddings", "3"])
    assert {n for n, share in moved(model, more).items() if share} == {"2.weight"}


def test_norms_of_every_kind_are_known() -> None:
    from torchvision.models.convnext import LayerNorm2d

    norms = [nn.BatchNorm2d(4), nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.RMSNorm(4), LayerNorm2d(4)]
    model = nn.Sequential(nn.Conv2d(1, 4, 1, bias=False), *norms, nn.PReLU())
    decay = options(model, build(model, name="AdamW", no_decay=["norms", "biases"]), "weight_decay")
    assert {name for name, value in decay.items() if value} == {"0.weight", "6.weight"}


# --- groups -----------------------------------------------------------------------------------------


def test_the_first_group_whose_pattern_matches_gives_a_weight_its_options() -> None:
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "head": nn.Linear(2, 2)})
    groups = [
        {"match": "body.0", "lr": "x0.1"},
        {"match": ["*.bias"], "weight_decay": 0.5, "momentum": 0.9},
        {"match": "head", "lr": 3},
    ]
    optimizer = build(model, name="SGD", groups=groups, args={"weight_decay": 0.25})
    assert options(model, optimizer, "lr") == {
        "body.0.weight": pytest.approx(0.1), "body.0.bias": pytest.approx(0.1), "body.1.weight": 1.0,
        "body.1.bias": 1.0, "head.weight": 3.0, "head.bias": 1.0,
    }  # fmt: skip
    assert moved(model, optimizer) == {
        "body.0.weight": 0.025, "body.0.bias": 0.025, "body.1.weight": 0.25, "body.1.bias": 0.5,
        "head.weight": 0.75, "head.bias": 0.5,
    }  # fmt: skip
    optim.scale_lr(optimizer, 0.5)
    assert options(model, optimizer, "lr")["head.weight"] == 1.5
    assert options(model, optimizer, "momentum")["head.bias"] == 0.9


def test_rates_of_groups_count_from_the_rate_of_the_optimizer_that_steps_them() -> None:
    model = mlp((1, 4, 4), 3, hidden=[8, 8])
    args = {"rest": {"AdamW": {"lr": 0.01}}}
    rates = options(model, build(model, name="Muon", groups=[{"match": "1", "lr": "x0.5"}], args=args), "lr")
    assert list(rates.values()) == pytest.approx([0.5, 0.005, 1.0, 0.01, 0.01, 0.01])


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"groups": [{"match": "haed", "lr": 1}]}, r"\[0\].match: no weight's name matches 'haed' .*'head'"),
        ({"groups": [{"match": "head"}, {"match": "head.bias"}]}, r"\[1\].match: all .* in groups before it"),
        ({"groups": [{"match": "tail"}]}, r"nothing that matches 'tail' has weights to train"),
        ({"groups": [{"match": "head", "momentun": 1}]}, r"SGD has no option 'momentun'.*'momentum'"),
        ({"groups": [{"match": "head", "momentum": "much"}]}, "'SGD' can't take a step in this loop"),
        ({"groups": [{"match": "head", "lr": "y2"}]}, r"'optim.groups' has as \[0\].lr neither"),
        ({"groups": [{"match": "head", "lr": -1}]}, r"'optim.groups' has as \[0\].lr neither"),
        ({"groups": [{"lr": 1}]}, r"'optim.groups' has as \[0\] nothing like {match: head, lr: x0.1}"),
        ({"groups": [{"match": "head", "params": 1}]}, r"has as \[0\].params what is not yours to set"),
        ({"groups": ["head"]}, r"'optim.groups' has as \[0\] nothing like"),
        ({"no_decay": ["norm"]}, "optim.no_decay: no weight's name matches 'norm' .*'norms'"),
        ({"no_decay": ["heads"]}, "optim.no_decay: no weight's name matches 'heads' .*'head'"),
        ({"name": "Muon", "layer_decay": 0.5, "args": {"rest": {"SGD": {"lr": "x"}}}}, "SGD refused lr"),
        ({"no_decay": ["head"], "name": "Rprop"}, "Rprop has no option 'weight_decay', which .*no_decay"),
    ],
)
def test_a_mistake_in_groups_is_one_sentence(section: dict[str, Any], told: str) -> None:
    model = nn.ModuleDict({"tail": nn.Linear(2, 2).requires_grad_(False), "head": nn.Linear(2, 2)})
    with pytest.raises(UserError, match=told) as error:
        build(model, **{"name": "SGD", **section})
    assert "\n" not in str(error.value)


# --- depth ------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """Layers beside each other, as attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm, self.conv2 = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3)
        self.fc = nn.Linear(2, 3)


class Wrapped(nn.Module):
    """A model in another one."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.drop = Plain(), nn.Dropout()


def by_prefix(model: nn.Module, *prefixes: str) -> list[set[int]]:
    """The layers of the weights whose names begin so."""
    numbers, named = layers(model), dict(model.named_parameters())
    return [{numbers[w] for name, w in named.items() if name.startswith(prefix)} for prefix in prefixes]


@pytest.mark.parametrize(
    ("make", "prefixes"),
    [
        (lambda: mlp((1, 4, 4), 3, hidden=[8, 8]), ["1.", "3.", "5."]),
        (lambda: cnn(1, 3, widths=[4, 8]), ["0.", "3.", "7.", "13."]),
        (lambda: GPT(11, (8,), depth=2, heads=2, width=4), ["symbols", "blocks.0", "blocks.1"]),
        (Plain, ["conv1", "conv2", "fc"]),
        (Wrapped, ["net.conv1", "net.conv2", "net.fc"]),
        (lambda: torchvision.models.resnet18(), ["conv1", "layer1.0", "layer1.1", "layer2.0", "layer2.1",
                                                 "layer3.0", "layer3.1", "layer4.0", "layer4.1", "fc"]),
    ],
)  # fmt: skip
def test_layers_are_numbered_from_the_input_on(make: Callable[[], nn.Module], prefixes: list[str]) -> None:
    model = make()
    assert by_prefix(model, *prefixes) == [{number} for number in range(len(prefixes))]
    assert set(layers(model).values()) == set(range(len(prefixes)))
    assert len(layers(model)) == len(list(model.parameters()))


def test_norms_tables_and_tokens_go_with_the_layer_before_them() -> None:
    model = torchvision.models.VisionTransformer(32, 8, 3, 2, 8, 16, num_classes=3)
    stem = by_prefix(model, "class_token", "conv_proj", "encoder.pos_embedding")
    blocks = by_prefix(model, *(f"encoder.layers.encoder_layer_{number}" for number in range(3)))
    assert [*stem, *blocks] == [{0}, {0}, {0}, {1}, {2}, {3}]
    assert by_prefix(model, "encoder.ln", "heads") == [{3}, {4}]
    assert by_prefix(Plain(), "norm") == [{0}]
    assert by_prefix(GPT(11, (8,), depth=2, heads=2, width=4), "positions", "norm") == [{0}, {2}]


def test_each_layer_has_a_share_of_the_rate_of_the_one_after_it() -> None:
    model = mlp((1, 4, 4), 3, hidden=[8, 8])
    wanted = {"layer_decay": 0.5, "no_decay": ["biases"], "groups": [{"match": "1.weight", "lr": "x2"}]}
    optimizer = build(model, name="AdamW", args={"weight_decay": 0.1}, **wanted)
    rates = options(model, optimizer, "lr")
    assert list(rates.values()) == pytest.approx([0.5, 0.25, 0.5, 0.5, 1.0, 1.0])
    assert list(options(model, optimizer, "weight_decay").values()) == [0.1, 0, 0.1, 0, 0.1, 0]


# --- runs -------------------------------------------------------------------------------------------


def test_a_run_with_groups_goes_on_exactly_and_only_with_the_same_groups(
    here: Callable[..., Any], small: list[str], tmp_path: Path
) -> None:
    words = [*small, "optim.name=AdamW", "optim.lr=0.01", "optim.no_decay=[norms,biases]",
             "optim.layer_decay=0.5", "optim.groups=[{match: '5', lr: x2}]"]  # fmt: skip
    here(*words, "run.name=whole")
    here(*words, "checkpoint.every=5")
    (tmp_path / "runs/run/checkpoints/step-00000012.pt").unlink()
    here(*words, "checkpoint.every=5")
    assert read_attempts(tmp_path / "runs/run")[-1]["step"] == 10
    assert same_bits(last(tmp_path), last(tmp_path, "whole"))
    assert "6 groups of weights, with rates from 0.0025 to 0.02, 3 of 6 weights without decay" in (
        (tmp_path / "runs/run/log.txt").read_text()
    )
    longer = [*words, "train.steps=13"]
    with pytest.raises(UserError, match=r"optim\.layer_decay: 0\.5 -> 0\.6"):
        here(*longer, "optim.layer_decay=0.6")
    with pytest.raises(UserError, match="put weights into other groups now"):
        here(*longer, "optim.no_decay=[biases]", "optim.layer_decay=1.0", allow_changes=True)
    here(*longer, "optim.groups=[{match: '5', lr: x3}]", allow_changes=True)
    rates = sorted({group["initial_lr"] for group in last(tmp_path)["optimizer"]["param_groups"]})
    assert rates == pytest.approx([0.0025, 0.005, 0.03])


@pytest.fixture
def packages(missing: Callable[[str], Any]) -> Iterator[None]:
    """timm and pytorch_optimizer, with which the project is developed."""
    for name in ("timm", "pytorch_optimizer"):
        try:
            __import__(name)
        except ModuleNotFoundError:
            missing(f"{name} is not installed: pip install -e '.[dev]'")
    return None


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize(
    "name",
    [
        "timm/lamb",
        *(
            pytest.param(name, marks=pytest.mark.long)
            for name in ("Muon", "timm/lion", "pytorch_optimizer:AdaBelief")
        ),
    ],
)
def test_an_optimizer_that_is_not_of_torch_trains_and_goes_on_exactly(
    name: str, here: Callable[..., Any], npz: Path, tmp_path: Path
) -> None:
    words = [*SMALL, f"optim.name={name}", "optim.lr=0.01", "optim.no_decay=[biases]", "train.steps=20",
             "checkpoint.best=none"]  # fmt: skip
    whole = here(*words, "run.name=whole")
    assert whole.metrics["eval/accuracy"] > 0.9
    here(*words, "checkpoint.every=15")
    (tmp_path / "runs/run/checkpoints/step-00000020.pt").unlink()
    here(*words, "checkpoint.every=15")
    assert read_attempts(tmp_path / "runs/run")[-1]["step"] == 15
    assert same_bits(last(tmp_path), last(tmp_path, "whole"))
    assert len(last(tmp_path)["optimizer"]["state"]) == len(last(tmp_path)["model"])


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("timm/lambb", "optim.name: timm has no optimizer 'lambb'.*'lamb'"),
        ("timm/fusedadam", "optim.name: 'timm/fusedadam' can't be used here: CUDA required"),
        ("pytorch_optimizer:AliG", "'pytorch_optimizer:AliG' can't take a step in this loop: AliG"),
        ("pytorch_optimizer:ScheduleFreeAdamW", "must be told of each evaluation"),
    ],
)
def test_an_optimizer_that_does_not_work_with_this_loop_is_refused(name: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        build(nn.Linear(2, 2), name=name)


@pytest.mark.usefixtures("packages")
def test_layers_of_a_model_of_timm_are_those_that_it_names() -> None:
    import timm
    from timm.optim import param_groups_layer_decay

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3, depth=3)
    theirs = {
        weight: group["lr_scale"]
        for group in param_groups_layer_decay(model, layer_decay=0.75)
        for weight in group["params"]
    }
    ours = options(model, build(model, name="AdamW", layer_decay=0.75), "lr")
    assert ours == pytest.approx({name: theirs[weight] for name, weight in model.named_parameters()})
    assert len(set(ours.values())) > 4


NOISY = """
import torch
class Noisy(torch.optim.SGD):
    def step(self, closure=None):
        for group in self.param_groups:
            for weight in group["params"]:
                weight.grad += 0.01 * torch.randn(weight.shape)
        super().step()
"""


@pytest.mark.long
def test_an_optimizer_that_draws_random_numbers_draws_the_same_on_all_ranks(
    here: Callable[..., Any], ranks: Callable[..., Any], small: list[str], tmp_path: Path
) -> None:
    (tmp_path / "noisy.py").write_text(NOISY)
    words = [*small, "optim.name=noisy:Noisy", "train.parts=2", "threads=1", "train.clip_value=0.01"]
    here(*words, "run.name=one")
    assert all(rank.rc == 0 for rank in ranks(2, "train", *words))
    assert equal(last(tmp_path)["model"], last(tmp_path, "one")["model"])
