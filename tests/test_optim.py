"""How weights follow gradients: optimizers by name, the learning rate, clipping, the moving average."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from dist_train import optim
from dist_train.config import Config, UserError, from_mapping
from dist_train.config.options import OBJECT
from dist_train.config.schema import each_key
from dist_train.models.gpt import GPT
from dist_train.optim import rates as rates_module
from dist_train.predict import evaluate_run
from dist_train.record.history import read_attempts, read_metrics
from tests.distributed.ranks import equal, last, same_bits
from tests.processes import Finished
from tests.worlds import SMALL


def rates(total: int, per_epoch: int = 10, lr: float = 1.0, **schedule: Any) -> list[float]:
    config = from_mapping({"optim": {"lr": lr}, "schedule": schedule, "train": {"steps": total}})
    function = rates_module.schedule(config, total, per_epoch)
    return [lr * function(step, {}) for step in range(total)]


def optimizers() -> list[str]:
    """The classes of torch.optim that are optimizers."""
    return [
        name
        for name, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and name != "Optimizer"
    ]


# --- the learning rate -------------------------------------------------------------------------------


def test_a_constant_rate_is_the_peak_at_every_step() -> None:
    assert rates(5, lr=0.3) == [0.3] * 5


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_a_falling_rate_starts_at_the_peak_and_ends_at_its_final_share(name: str) -> None:
    for final in (0.0, 0.1):
        values = rates(11, lr=2.0, name=name, args={"final": final})
        assert values[0] == 2.0
        assert values[-1] == pytest.approx(2.0 * final, abs=1e-12)
        assert values[5] == pytest.approx(2.0 * (1 + final) / 2)
        assert values == sorted(values, reverse=True)


def test_a_line_may_rise_before_it_falls() -> None:
    values = rates(9, name="linear", args={"rise": 0.5, "final": 0.2})
    assert values == pytest.approx([0, 0.25, 0.5, 0.75, 1, 0.8, 0.6, 0.4, 0.2])


def test_one_cycle_rises_to_its_peak_and_falls_to_its_end() -> None:
    values = rates(101, name="one_cycle")
    assert values[0] == pytest.approx(0.04)
    assert values[30] == pytest.approx(1.0)
    assert values[-1] == pytest.approx(0.0, abs=1e-12)
    assert values[:31] == sorted(values[:31])
    assert values[30:] == sorted(values[30:], reverse=True)
    other = rates(101, name="one_cycle", args={"rise": 0.5, "start": 0.2, "final": 0.1})
    assert [other[0], other[50], other[100]] == pytest.approx([0.2, 1.0, 0.1])


def test_steps_fall_at_their_milestones() -> None:
    assert rates(5, name="step") == pytest.approx([1, 1, 0.1, 0.01, 0.01])
    assert rates(5, name="step", args={"milestones": [0.75], "gamma": 0.5}) == [1, 1, 1, 0.5, 0.5]


@pytest.mark.parametrize(("warmup", "steps"), [(4, 4), ("2 epochs", 20), ("1 epoch", 10)])
def test_a_warm_up_rises_in_a_line_and_the_schedule_begins_after_it(warmup: Any, steps: int) -> None:
    values = rates(steps + 11, lr=0.5, name="linear", warmup=warmup)
    assert values[:steps] == pytest.approx([0.5 * (k + 1) / steps for k in range(steps)])
    assert values[steps] == 0.5
    assert values[-1] == pytest.approx(0.0, abs=1e-12)


def test_wsd_stays_at_its_peak_and_falls_at_the_end() -> None:
    values = rates(26, lr=2.0, name="wsd", warmup=5, args={"decay": 0.4, "final": 0.1})
    assert values[5:18] == [2.0] * 13
    assert values[17:] == pytest.approx([2.0 + (0.2 - 2.0) * k / 8 for k in range(9)])
    root = rates(26, lr=1.0, name="wsd", args={"decay": "5 steps", "shape": "root"})
    assert root[20:] == pytest.approx([1 - math.sqrt(k / 5) for k in range(6)])


def test_lengths_and_moments_of_a_schedule_may_be_steps_and_epochs() -> None:
    """A length counts back from the end, a moment from the beginning, the warm-up included."""
    for total in (41, 61):
        falling = rates(total, name="wsd", warmup="1 epoch", args={"decay": "2 epochs"})
        assert [k for k in range(10, total) if falling[k] == 1.0] == list(range(10, total - 20))
        stairs = rates(total, name="step", warmup=5, args={"milestones": ["2 epochs", "30 steps"]})
        assert stairs[5:] == pytest.approx([1.0] * 15 + [0.1] * 10 + [0.01] * (total - 30))


@pytest.mark.parametrize(("patience", "by", "final"), [(0, 0.0, 0.0), (2, 0.0, 0.3), (1, 0.05, 0.0)])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_plateau_lowers_the_rate_as_that_of_torch(patience: int, by: float, final: float, mode: str) -> None:
    values = torch.rand(40, generator=torch.Generator().manual_seed(1)).tolist()
    values[7] = math.nan
    (weight,) = nn.Linear(1, 1, bias=False).parameters()
    optimizer = torch.optim.SGD([weight], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, mode, 0.5, patience, threshold=by, threshold_mode="abs", min_lr=final, eps=0
    )
    args = {"factor": 0.5, "patience": patience, "by": by, "final": final, "metric": f"{mode} eval/x"}
    config = from_mapping(
        {"schedule": {"name": "plateau", "args": args, "warmup": 2}, "train": {"steps": 99}}
    )
    ours = rates_module.schedule(config, 99, 9)
    for count, value in enumerate(values, 1):
        theirs.step(value)
        assert ours(50, {"eval/x": values[:count], "eval/y": []}) == optimizer.param_groups[0]["lr"]
    assert ours(0, {"eval/x": values}) == 0.5  # of the warm-up
    assert ours(50, {}) == 1.0


def test_a_run_of_one_step_has_a_rate() -> None:
    for name in rates_module.SCHEDULES:
        assert math.isfinite(*rates(1, name=name))


def test_one_cycle_may_only_rise_or_only_fall() -> None:
    rising, falling = (rates(11, name="one_cycle", args={"rise": rise}) for rise in (1.0, 0.0))
    assert [rising[0], rising[-1]] == pytest.approx([0.04, 1])
    assert rising == sorted(rising)
    assert [falling[0], falling[-1]] == pytest.approx([1, 0], abs=1e-12)
    assert falling == sorted(falling, reverse=True)


@pytest.mark.parametrize(
    ("name", "args", "told"),
    [
        ("one_cycle", {"rise": 1.5}, "rise is a share of the time, from 0 to 1, not 1.5"),
        ("one_cycle", {"rise": math.nan}, "rise is a share of the time"),
        ("linear", {"rise": 1}, "rise is a share of the time, from 0 to below 1, not 1"),
        ("one_cycle", {"rise": "0.3"}, "one_cycle refused"),
        (
            "one_cycle",
            {"start": -0.1},
            "the share of the learning rate by one_cycle is -0.1 at the moment 0 ",
        ),
        ("cosine", {"final": math.nan}, "the share of the learning rate by cosine is nan"),
        ("cosine", {"final": "0.1"}, "cosine refused"),
        ("linear", {"final": -1}, "is -0.1 at the moment 0.55"),
        ("linear", {"final": math.inf}, "the share of the learning rate by linear is"),
        ("step", {"milestones": [0.5, "0.75"]}, "step refused"),
        ("step", {"milestones": "0.5"}, "milestones is a list of moments from 0 to 1, not '0.5'"),
        ("step", {"milestones": [30, 60]}, r"milestones is a list of moments from 0 to 1, not \[30, 60\]"),
        ("step", {"milestones": 0.5}, "milestones is a list"),
        ("step", {"gamma": "0.1"}, "step refused"),
        ("step", {"gamma": -0.1, "milestones": [0.501, 0.502]}, "is -0.1 at the moment 0.501"),
        ("step", {"gamma": 1e200}, "step refused"),
        ("step", {"milestones": ["1 epoch", "2 epochs"]}, "milestones is a list of moments from 0 to 1"),
        ("wsd", {"decay": 1.5}, "decay is a share of the time, from 0 to 1, not 1.5"),
        ("wsd", {"shape": "square"}, "shape is linear or root, not 'square'"),
        ("plateau", {"factor": 2}, "factor lies between 0 and 1"),
        ("plateau", {"patient": 2}, "patient: plateau has no such argument .*'patience'"),
        ("plateau", {"sign": 1}, "sign: it is not yours to set"),
        ("plateau", {"metric": "loss"}, "metric: is written as `max eval/accuracy`, not 'loss'"),
    ],
)
def test_a_schedule_that_would_fail_at_some_step_is_refused_at_the_start(
    name: str, args: dict[str, Any], told: str
) -> None:
    config = from_mapping(
        {"optim": {"lr": 1}, "schedule": {"name": name, "args": args}, "train": {"steps": 9}}
    )
    with pytest.raises(UserError, match=f"schedule.args[.:].*{told}"):
        rates_module.schedule(config, 9, 9)


def test_every_schedule_is_a_choice_of_its_key() -> None:
    choices = next(rule.choices for key, rule, _ in each_key(Config()) if key == "schedule.name")
    assert list(choices) == [*rates_module.SCHEDULES, OBJECT]


WAVES = """
import math

PEAKS = 3

def waves(t, count=2, least=0.1):
    return least + (1 - least) * (1 + math.cos(2 * math.pi * count * t)) / 2

def of_x(x):
    return 1.0

def text(t):
    return "1"
"""


@pytest.fixture
def my_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_schedule.py").write_text(WAVES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("my_schedule")
def test_a_schedule_of_ones_own_is_a_function_of_the_moment() -> None:
    values = rates(9, lr=2.0, name="my_schedule:waves")
    assert [values[0], values[2], values[4], values[8]] == pytest.approx([2.0, 0.2, 2.0, 2.0])
    warm = rates(13, lr=2.0, name="my_schedule:waves", warmup=4, args={"count": 1, "least": 0.5})
    assert warm[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert warm[8] == pytest.approx(1.0)


@pytest.mark.usefixtures("my_schedule")
@pytest.mark.parametrize(
    ("name", "args", "told"),
    [
        ("my_schedule:wave", {}, r"schedule.name: module 'my_schedule' has no 'wave' \(did you mean 'waves'"),
        ("my_schedule:PEAKS", {}, "schedule.name: 'my_schedule:PEAKS' is no function of the moment t"),
        ("no_such_module:waves", {}, "schedule.name: there is no module 'no_such_module'"),
        ("my_schedule:waves", {"cont": 3}, r"schedule.args.cont: waves has no such .* 'count'"),
        ("my_schedule:waves", {"least": -1}, "my_schedule:waves is -0.3.* at the moment"),
        ("my_schedule:of_x", {}, "schedule.args.x: of_x needs this argument"),
        ("my_schedule:text", {}, "my_schedule:text is '1' at the moment 0"),
    ],
)
def test_what_is_wrong_with_a_schedule_of_ones_own_is_told_at_the_start(
    name: str, args: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError, match=told):
        rates(9, name=name, args=args)


@pytest.mark.usefixtures("my_schedule")
def test_a_run_with_a_schedule_of_ones_own_goes_on_exactly(
    here: Callable[..., Any], small: list[str], tmp_path: Path
) -> None:
    words = [*small, "schedule.name=my_schedule:waves", "checkpoint.every=5", "log.every=1"]
    here(*words, "run.name=whole")
    here(*words)
    for path in (tmp_path / "runs/run/checkpoints").glob("step-*12.pt"):
        path.unlink()
    here(*words)
    assert read_attempts(tmp_path / "runs/run")[-1]["step"] == 10
    assert same_bits(last(tmp_path), last(tmp_path, "whole"))
    logged = [row["lr"] for row in read_metrics(tmp_path / "runs/run") if "lr" in row]
    assert logged == pytest.approx(rates(12, lr=0.1, name="my_schedule:waves"))


def test_the_rate_in_the_record_is_the_one_that_was_used(
    here: Callable[..., Any], small: list[str], tmp_path: Path
) -> None:
    here(*small, "schedule.name=cosine", "schedule.warmup=3", "log.every=1")
    logged = [row["lr"] for row in read_metrics(tmp_path / "runs" / "run") if "lr" in row]
    assert logged == pytest.approx(rates(12, lr=0.1, name="cosine", warmup=3))


# --- optimizers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", optimizers())
def test_every_optimizer_of_torch_takes_a_step_or_is_refused(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    config = from_mapping({"optim": {"name": name, "lr": 0.01}, "train": {"steps": 1}})
    if name in ("LBFGS", "SparseAdam"):  # needs closures; needs sparse gradients
        with pytest.raises(UserError, match=f"optim.name: .*'{name}'"):
            optim.build(config, model)
        return
    optimizer = optim.build(config, model)
    optim.scale_lr(optimizer, 2)
    inputs, targets = torch.randn(16, 6), torch.randint(0, 3, (16,))
    before = [weight.detach().clone() for weight in model.parameters()]
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(model(inputs), targets)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert all((new != old).any() for new, old in zip(model.parameters(), before, strict=True))


def test_muon_makes_steps_of_hidden_matrices_orthogonal_and_another_optimizer_does_the_rest() -> None:
    torch.manual_seed(0)
    first, last = nn.Conv2d(2, 6, 3), nn.Linear(6, 3)
    model = nn.Sequential(first, nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), last)
    args = {"rest": {"SGD": {"lr": 0.5, "momentum": 0.9}}}
    config = from_mapping({"optim": {"name": "Muon", "lr": 0.1, "args": args}, "train": {"steps": 1}})
    optimizer = optim.build(config, model)
    before = [weight.detach().clone() for weight in model.parameters()]
    nn.functional.cross_entropy(model(torch.randn(8, 2, 5, 5)), torch.arange(8) % 3).backward()
    gradients = [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]
    optim.scale_lr(optimizer, 0.5)
    optimizer.step()
    moved = [old - new for new, old in zip(model.parameters(), before, strict=True)]
    u, s, v = torch.linalg.svd(moved[0].detach().flatten(1) / 0.05, full_matrices=False)
    assert s.min() > 0.5 and s.max() < 1.3
    nearest = torch.linalg.svd(gradients[0].flatten(1), full_matrices=False)
    assert torch.allclose(u @ v, nearest.U @ nearest.Vh, atol=1e-3)
    for step, gradient in zip(moved[1:], gradients[1:], strict=True):  # SGD's first step
        assert torch.allclose(step, 0.25 * gradient, atol=1e-6)


def test_muon_leaves_tables_and_outputs_to_the_other_optimizer() -> None:
    model = GPT(num_classes=11, input_shape=(8,), depth=2, heads=2, width=4)
    hidden, rest = optim.build(
        from_mapping({"optim": {"name": "Muon"}, "train": {"steps": 1}}), model
    ).param_groups
    assert len(hidden["params"]) == 2 * 4 - 1
    assert {id(model.symbols.weight), id(model.positions.weight)} < {id(weight) for weight in rest["params"]}
    assert len(hidden["params"]) + len(rest["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("rest", "told"),
    [
        ("AdamW", "optim.args.rest: write the optimizer"),
        ({"AdamW": {}, "SGD": {}}, "optim.args.rest: write the optimizer"),
        ({"Adamw": {}}, r"optim.args.rest: torch.optim has no .*'Adamw'.*did you mean 'AdamW'"),
        ({"os:system": {}}, "optim.args.rest: torch.optim has no"),
        ({"SGD": {"momentun": 0.9}}, "optim.args.rest.SGD.momentun: SGD has no such argument"),
    ],
)
def test_a_mistake_in_the_rest_of_muon_is_told(rest: Any, told: str) -> None:
    config = from_mapping({"optim": {"name": "Muon", "args": {"rest": rest}}, "train": {"steps": 1}})
    with pytest.raises(UserError, match=told):
        optim.build(config, nn.Linear(2, 2))


def test_arguments_reach_the_optimizer() -> None:
    args = {"betas": [0.8, 0.9], "weight_decay": 0.3}
    config = from_mapping({"optim": {"name": "AdamW", "args": args}, "train": {"steps": 1}})
    (group,) = optim.build(config, nn.Linear(2, 2)).param_groups
    assert (tuple(group["betas"]), group["weight_decay"], group["lr"]) == ((0.8, 0.9), 0.3, 1e-3)


def test_frozen_weights_are_left_alone_and_a_model_without_weights_is_refused() -> None:
    config = from_mapping({"train": {"steps": 1}})
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    (group,) = optim.build(config, model).param_groups
    assert [id(weight) for weight in group["params"]] == [id(weight) for weight in model[1].parameters()]
    with pytest.raises(UserError, match="no weights to train"):
        optim.build(config, nn.Flatten())


def test_an_optimizer_of_ones_own_goes_by_module_and_object(
    here: Callable[..., Any], npz: Path, tmp_path: Path
) -> None:
    (tmp_path / "my_optimizer.py").write_text(
        "import torch\n"
        "class Sign(torch.optim.SGD):\n"
        "    def step(self, closure=None):\n"
        "        for group in self.param_groups:\n"
        "            for weight in group['params']:\n"
        "                weight.grad.sign_()\n"
        "        super().step()\n"
    )
    result = here(*SMALL, "optim.name=my_optimizer:Sign", "optim.lr=0.001", "train.steps=30")
    assert result.metrics["eval/accuracy"] > 0.9


GROUPS = """
import torch

def groups(weights, lr, decay=0.01, slow=0.1):
    matrices = [weight for weight in weights if weight.ndim > 1]
    others = [weight for weight in weights if weight.ndim <= 1]
    slowly = {"params": others, "lr": slow * lr, "weight_decay": 0.0}
    return torch.optim.AdamW([slowly, {"params": matrices}], lr=lr, weight_decay=decay)

def one_group(weights, lr):
    return torch.optim.AdamW(weights, lr=lr)

def nothing(weights, lr):
    return None

def negative(weights, lr):
    return torch.optim.SGD([{"params": weights, "lr": torch.tensor(float("nan"))}])
"""


def test_a_schedule_scales_the_rate_of_each_group_of_weights(
    here: Callable[..., Any], small: list[str], tmp_path: Path
) -> None:
    (tmp_path / "my_groups.py").write_text(GROUPS)
    words = [
        *small,
        "optim.name=my_groups:groups",
        "schedule.name=cosine",
        "schedule.warmup=3",
        "log.every=1",
    ]
    here(*words, "train.steps=12", "checkpoint.every=1", "checkpoint.keep=20")
    expected = rates(12, lr=0.1, name="cosine", warmup=3)
    logged = [row["lr"] for row in read_metrics(tmp_path / "runs/run") if "lr" in row]
    assert logged == pytest.approx(expected)
    for step, rate in enumerate(expected, 1):
        path = tmp_path / f"runs/run/checkpoints/step-{step:08}.pt"
        slow, fast = torch.load(path, weights_only=True)["optimizer"]["param_groups"]
        assert [slow["lr"], fast["lr"]] == pytest.approx([0.1 * rate, rate])
        assert [slow["weight_decay"], fast["weight_decay"]] == [0.0, 0.01]


def test_a_run_with_groups_of_weights_goes_on_exactly_also_in_the_warm_up(
    here: Callable[..., Any], small: list[str], tmp_path: Path
) -> None:
    (tmp_path / "my_groups.py").write_text(GROUPS)
    words = [*small, "optim.name=my_groups:groups", "optim.args.decay=0.2", "schedule.name=cosine",
             "schedule.warmup=3", "checkpoint.every=2"]  # fmt: skip
    here(*words, "run.name=straight")
    name = "checkpoints/step-00000002.pt"
    here(*words, "run.name=other", "checkpoint.keep=20")
    (tmp_path / "runs/run/checkpoints").mkdir(parents=True)
    shutil.copy(tmp_path / "runs/other" / name, tmp_path / "runs/run" / name)
    again = here(*words)
    assert (again.state, again.step) == ("completed", 12)
    log = (tmp_path / "runs/run/log.txt").read_text()
    assert "(step 2)" in log
    first, second = (
        torch.load(tmp_path / f"runs/{run}/checkpoints/last.pt", weights_only=True)
        for run in ("straight", "run")
    )
    assert same_bits(first, second)


def test_what_the_configuration_changes_of_a_group_holds_when_a_run_goes_on(
    here: Callable[..., Any], small: list[str], tmp_path: Path
) -> None:
    (tmp_path / "my_groups.py").write_text(GROUPS)
    words = [*small, "optim.name=my_groups:groups"]
    here(*words)
    more = [*words, "train.steps=14", "optim.args.decay=0.3", "optim.args.slow=0.5", "optim.lr=0.02"]
    here(*more, allow_changes=True)
    saved = torch.load(tmp_path / "runs/run/checkpoints/last.pt", weights_only=True)["optimizer"]
    slow, fast = saved["param_groups"]
    assert [slow["lr"], fast["lr"]] == pytest.approx([0.01, 0.02])
    assert [slow["weight_decay"], fast["weight_decay"]] == [0.0, 0.3]


def test_a_saved_optimizer_of_other_groups_is_told(
    here: Callable[..., Any], small: list[str], tmp_path: Path
) -> None:
    (tmp_path / "my_groups.py").write_text(GROUPS)
    here(*small, "run.name=first", "optim.name=my_groups:groups")
    with pytest.raises(UserError, match="the optimizer has 1 group of weights, the saved one 2"):
        here(*small, "resume=runs/first", "optim.name=my_groups:one_group")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nothing", "optim.name: .* made a NoneType, no optimizer"),
        ("negative", "optim.lr: the rate .* is nan"),
    ],
)
def test_what_is_no_optimizer_is_told(
    name: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_mistakes.py").write_text(GROUPS)
    monkeypatch.chdir(tmp_path)
    config = from_mapping({"optim": {"name": f"my_mistakes:{name}"}, "train": {"steps": 1}})
    with pytest.raises(UserError, match=told):
        optim.build(config, nn.Linear(2, 2))


# --- clipping, the moving average, precision ---------------------------------------------------------


def weights(tmp_path: Path, name: str) -> dict[str, Any]:
    saved = torch.load(tmp_path / "runs" / name / "checkpoints" / "last.pt", weights_only=True)
    return {part: saved[part] for part in ("model", "average", "metrics")}


def flat(state: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([value.double().flatten() for _, value in sorted(state.items())])


def test_clipping_bounds_the_length_of_a_step(
    here: Callable[..., Any], small: list[str], tmp_path: Path
) -> None:
    """Plain SGD with rate 1 moves by the gradient: its length is the clipped norm, or the free one."""
    moved = {}
    for name, arguments in {"start": ["optim.lr=0"], "free": [], "clipped": ["train.clip_norm=0.01"]}.items():
        here(*small, f"run.name={name}", "train.steps=1", "optim.lr=1", *arguments)
        moved[name] = flat(weights(tmp_path, name)["model"])
    free, clipped = moved["free"] - moved["start"], moved["clipped"] - moved["start"]
    assert free.norm() > 0.1
    assert clipped.norm().item() == pytest.approx(0.01, rel=1e-3)
    assert torch.dot(free, clipped) / free.norm() / clipped.norm() > 0.999


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_clipping_by_value_bounds_each_number_of_a_step(
    precision: str, here: Callable[..., Any], small: list[str], tmp_path: Path
) -> None:
    moved = {}
    for name, words in {"start": ["optim.lr=0"], "free": [], "clipped": ["train.clip_value=0.01"]}.items():
        here(*small, f"run.name={name}", "train.steps=1", "optim.lr=1", f"precision={precision}", *words)
        moved[name] = flat(weights(tmp_path, name)["model"])
    free, clipped = moved["free"] - moved["start"], moved["clipped"] - moved["start"]
    assert free.abs().max() > 0.02
    assert torch.allclose(clipped, free.clamp(-0.01, 0.01), atol=1e-6)


def test_the_moving_average_follows_its_formula_and_is_what_is_evaluated(
    here: Callable[..., Any], small: list[str], tmp_path: Path
) -> None:
    decay, steps = 0.7, 5
    here(*small, f"train.ema={decay}", f"train.steps={steps}", "checkpoint.every=1", "checkpoint.keep=9")
    folder = tmp_path / "runs/run/checkpoints"
    states = [torch.load(path, weights_only=True) for path in sorted(folder.glob("step-*.pt"))]
    assert [state["step"] for state in states] == [1, 2, 3, 4, 5]
    average = flat(states[0]["average"])
    for step, state in enumerate(states[1:], start=1):
        used = min(decay, (1 + step) / (10 + step))
        average = used * average + (1 - used) * flat(state["model"])
        assert torch.allclose(flat(state["average"]), average, atol=1e-6)
    exported = load_file(tmp_path / "runs/run/model.safetensors")
    assert torch.equal(flat(exported), flat(states[-1]["average"]))
    assert not torch.equal(flat(exported), flat(states[-1]["model"]))
    assert evaluate_run(folder / "last.pt") == states[-1]["metrics"]


@pytest.mark.parametrize(
    "arguments",
    [["precision=bf16"], ["precision=tf32"], ["channels_last=true"], ["deterministic=true"]],
    ids=lambda arguments: arguments[0],
)
def test_a_cnn_trains_close_to_plain_fp32(
    arguments: list[str], here: Callable[..., Any], small: list[str], tmp_path: Path
) -> None:
    cnn = ["model.name=cnn", "model.args.widths=[8,16]", "optim.lr=0.02"]
    losses = []
    for name, extra in (("plain", []), ("other", arguments)):
        here(*small, *cnn, f"run.name={name}", *extra)
        losses.append(weights(tmp_path, name)["metrics"]["eval/loss"])
        assert all(value.dtype != torch.bfloat16 for value in weights(tmp_path, name)["model"].values())
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    if arguments == ["precision=bf16"]:
        assert losses[0] != losses[1]  # it did calculate in other numbers


@pytest.mark.long
def test_a_compiled_run_that_goes_on_in_another_process_ends_with_the_same_bits(
    cli: Callable[..., Finished],
    here: Callable[..., Any],
    small: list[str],
    tmp_path: Path,
    missing: Callable[[str], Any],
) -> None:
    """Step 6 is a short batch, with which the second process begins: code for it is used for no other."""
    if not (shutil.which("g++") or shutil.which("clang++")):
        missing("torch.compile needs a C++ compiler")
    words = [*small, "model.name=cnn", "model.args.widths=[8]", "train.ema=0.5", "eval.every=never"]
    one = {"TORCHINDUCTOR_COMPILE_THREADS": 1}  # processes that compile would import torch first
    for name, steps in (("straight", 12), ("halting", 5), ("halting", 12)):
        finished = cli(
            "train", *words, "compile=true", f"run.name={name}", f"train.steps={steps}", env=one, timeout=300
        )
        assert finished.rc == 0, finished
    compiled = weights(tmp_path, "straight")
    assert equal(compiled["model"], weights(tmp_path, "halting")["model"])
    here(*words, "run.name=plain")
    plain = weights(tmp_path, "plain")
    assert plain["model"].keys() == compiled["model"].keys() == compiled["average"].keys()
    assert torch.allclose(flat(plain["model"]), flat(compiled["model"]), atol=1e-5)
    metrics = evaluate_run("runs/straight", ["compile=false"])
    assert metrics["eval/loss"] == pytest.approx(compiled["metrics"]["eval/loss"], rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_moving_average_is_evaluated_in_the_arithmetic_of_the_run(
    precision: str, here: Callable[..., Any], small: list[str]
) -> None:
    result = here(*small, f"precision={precision}", "train.ema=0.9", "model.args.hidden=[64]")
    assert evaluate_run(result.folder / "checkpoints/last.pt") == result.metrics
