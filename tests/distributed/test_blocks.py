"""Blocks that are computed twice, BatchNorm over all processes, and arguments of torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dist_train.config import UserError
from dist_train.models.batchnorm import synchronize
from dist_train.models.blocks import recompute
from dist_train.parallel import compile_module
from tests.distributed.ranks import distance, last, same_bits
from tests.processes import Finished
from tests.worlds import SMALL

CNN = [
    *SMALL, "model.name=cnn", "model.args={widths: [8, 8], dropout: 0.2}", "train.parts=2", "train.steps=8",
    "checkpoint.every=4", "optim.args={fused: false}",
]  # fmt: skip

# --- computed again --------------------------------------------------------------------------------


@pytest.mark.long
def test_blocks_that_are_computed_again_change_no_bit(
    npz: Path, ranks: Callable[..., list[Finished]], here: Callable[..., Any], tmp_path: Path
) -> None:
    here(*CNN, "run.name=plain")
    for name, wanted in (("each", "true"), ("some", "1, 3, 5, 1?")):
        here(*CNN, f"run.name={name}", f"parallel.recompute={wanted}")
        assert same_bits(last(tmp_path, "plain"), last(tmp_path, name)), name
    for kind in ("ddp", "fsdp"):
        done = ranks(2, "train", *CNN, f"run.name={kind}", "parallel.recompute=true", f"parallel.name={kind}")
        assert [rank.rc for rank in done] == [0, 0], done[0].err
        assert same_bits(last(tmp_path, "plain"), last(tmp_path, kind)), kind


def test_what_is_computed_again_is_not_kept() -> None:
    inputs = torch.randn(4, 3, requires_grad=True)
    kept = []
    for wanted in (False, "0,2"):
        model = nn.Sequential(*(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Tanh()) for _ in range(3)))
        recompute(model, wanted)
        saved: list[torch.Tensor] = []

        def keep(tensor: torch.Tensor, saved: list[torch.Tensor] = saved) -> torch.Tensor:
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(inputs).sum()
        kept.append(len(saved))
    assert kept[1] <= kept[0] / 2


def test_names_of_blocks_that_there_are_not_are_told() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(UserError, match=r"parallel.recompute: no part of the model is named like 'layer1'"):
        recompute(model, "0, layer1")
    with pytest.raises(UserError, match=r"parallel.recompute: 0 holds 0.0, which is computed again, too"):
        recompute(model, "0*")


# --- BatchNorm -------------------------------------------------------------------------------------

SYNC = [*CNN, "train.parts=null", "model.args.dropout=0", "model.sync_batchnorm=true", "train.batch_size=20"]


@pytest.mark.long
def test_batchnorm_over_two_processes_is_that_of_one_with_the_whole_batch(
    npz: Path, ranks: Callable[..., list[Finished]], here: Callable[..., Any], tmp_path: Path
) -> None:
    """90 samples by 20: the last batch of an epoch has 10."""
    here(*SYNC, "run.name=one", "train.parts=1")
    here(*SYNC, "run.name=apart", "train.parts=2", "model.sync_batchnorm=false")
    for kind in ("ddp", "fsdp"):
        done = ranks(2, "train", *SYNC, f"run.name={kind}", f"parallel.name={kind}")
        assert [rank.rc for rank in done] == [0, 0], done[0].err
    one = last(tmp_path, "one")
    assert distance(one, last(tmp_path, "ddp")) < 1e-5
    assert distance(one, last(tmp_path, "apart")) > 1e-3
    assert distance(one, last(tmp_path, "fsdp")) < 1e-5
    ranks(2, "train", *SYNC, "run.name=again", "train.steps=5")
    ranks(2, "train", *SYNC, "run.name=again")
    assert same_bits(last(tmp_path, "ddp"), last(tmp_path, "again"))
    with pytest.raises(UserError, match="a step has 2 parts for 1 process, but statistics of all parts need"):
        here(*SYNC, "run.name=ddp", "train.steps=10")


@pytest.mark.parametrize("shape", [(7, 3), (4, 3, 5), (4, 3, 5, 2)])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_synchronized_layer_does_what_torchs_does(shape: tuple[int, ...], momentum: float | None) -> None:
    torch.manual_seed(0)
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)]
    layers = [kind(3, momentum=momentum) for _ in range(2)]
    synchronize(layers[1], lambda values: values)
    for _ in range(3):
        given = torch.randn(shape)
        found = []
        for layer in layers:
            inputs = given.clone().requires_grad_()
            outputs = layer(inputs)
            outputs.pow(3).sum().backward()
            found.append([outputs, inputs.grad, layer.weight.grad, *layer.state_dict().values()])
        for theirs, ours in zip(*found, strict=True):
            assert torch.allclose(theirs, ours, atol=1e-4), (theirs, ours)
    assert torch.allclose(layers[0].eval()(given), layers[1].eval()(given), atol=1e-5)


def test_a_part_without_samples_counts_nowhere() -> None:
    layer = nn.BatchNorm1d(2)
    full = torch.tensor([3.0, 5.0, 1.0])  # of another rank: sums of each channel, and their number
    terms = [full, torch.tensor([2.0, 4.0])]
    counting = synchronize(layer, lambda values: values + terms.pop(0))
    counting.now = False
    outputs = layer(torch.randn(4, 2))
    assert torch.allclose(layer.running_mean, 0.1 * torch.tensor([3.0, 5.0]))
    assert outputs.shape == (4, 2)


class Own(nn.BatchNorm2d):
    """A layer that does more."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs).relu()


def test_a_layer_that_does_more_is_told() -> None:
    with pytest.raises(UserError, match=r"model.sync_batchnorm: 0 is a Own, which does more than normalize"):
        synchronize(nn.Sequential(Own(3)), lambda values: values)


# --- torch.compile ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ({"mod": "default"}, "compile_args.mod: compile has no such argument .did you mean 'mode'"),
        ({"mode": "fastest"}, "compile_args: compile refused"),
        ({"backend": "nobody"}, "compile_args: compile refused"),
        ({"options": {"no_such_option": 1}}, "compile_args: compile refused"),
        ({"disable": True}, "compile_args.disable: not yours to set"),
    ],
)
def test_wrong_arguments_of_compile_are_told(args: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        compile_module(nn.Linear(2, 2), args)


def test_arguments_of_compile_reach_it(npz: Path, here: Callable[..., Any], tmp_path: Path) -> None:
    """The backend `eager` computes as the model does by itself: no bit differs, no compiler is needed."""
    here(*CNN, "run.name=plain")
    here(*CNN, "run.name=eager", "compile=true", "compile_args={backend: eager}")
    assert same_bits(last(tmp_path, "plain"), last(tmp_path, "eager"))
    told: list[Any] = []
    module = nn.Linear(2, 2)
    compile_module(module, {"backend": lambda graph, example: told.append(graph) or graph.forward})
    module(torch.zeros(1, 2))
    assert len(told) == 1
