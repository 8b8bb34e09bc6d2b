"""The configuration: files and arguments merged in order, checked, and printed so that it reads back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_train.config import Config, Every, UserError, from_mapping, get, load, nearest, to_mapping, to_yaml
from dist_train.config.schema import all_keys, each_field
from tests.conftest import REPO, Finished


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_later_files_win_over_earlier_ones_and_arguments_over_files(tmp_path: Path) -> None:
    one = write(
        tmp_path / "one.yaml", "seed: 1\ntrain: {epochs: 3, batch_size: 8}\noptim: {args: {momentum: 0.9}}"
    )
    two = write(tmp_path / "two.yaml", "seed: 2\ntrain: {batch_size: 16}\noptim: {args: {nesterov: true}}")
    config = load([one, two], ["seed=3", "optim.args.weight_decay=0.1"])
    assert (config.seed, config.train.epochs, config.train.batch_size) == (3, 3, 16)
    assert config.optim.args == {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}
    assert load([two, one], []).train.batch_size == 8


def test_the_run_is_named_after_the_first_file_unless_it_has_a_name(tmp_path: Path) -> None:
    one, two = (write(tmp_path / f"{name}.yaml", "train: {epochs: 1}") for name in ("one", "two"))
    assert load([one, two]).run_dir == Path("runs/one")
    assert load([one], ["run.name=mine", "run.dir=there"]).run_dir == Path("there/mine")
    assert load([], ["train.steps=1"]).run_dir == Path("runs/run")


def test_text_in_an_argument_is_taken_as_it_is_written() -> None:
    written = {
        "run.name": "001",
        "wandb.notes": "lr: high # or so",
        "wandb.group": "1e3",
        "data.root": "~/x, y",
    }
    config = load([], ["train.epochs=1", *(f"{key}={text}" for key, text in written.items())])
    assert {key: get(config, key) for key in written} == written
    assert load([], ["train.epochs=1", "wandb.notes=null"]).wandb.notes is None
    assert load([], ["train.epochs=1", "wandb.notes='null'"]).wandb.notes == "null"


def test_files_and_arguments_stand_in_any_order_on_the_command_line(
    tmp_path: Path, cli: Callable[..., Finished]
) -> None:
    write(tmp_path / "a.yaml", "train: {epochs: 3}")
    shown = [cli("config", *words) for words in (("a.yaml", "seed=4"), ("seed=4", "a.yaml"))]
    assert shown[0].rc == 0, shown[0]
    assert shown[0].out == shown[1].out
    assert "seed: 4" in shown[0].out


def test_the_printed_configuration_reads_back_to_the_same(
    tmp_path: Path, cli: Callable[..., Finished]
) -> None:
    words = [
        "train.epochs=2", "optim.lr=1e-3", "data.mean=[0.5]", "data.std=[0.25]", "wandb.tags=[a,b]",
        "data.train_transform=[RandomHorizontalFlip,{RandomCrop: {size: 28, padding: 2}}]",
        "schedule.warmup=2 epochs", "checkpoint.every=1 epoch, 10 minutes", "model.args.hidden=[3,4]",
        "wandb.notes=a: b # c", "data.target_transform=null",
    ]  # fmt: skip
    printed = cli("config", *words)
    assert printed.rc == 0, printed
    again = load([write(tmp_path / "printed.yaml", printed.out)], ["run.name=run"])
    assert again == load([], words)
    assert to_yaml(again) == printed.out
    assert from_mapping(to_mapping(again)) == again


def test_values_may_refer_to_others(tmp_path: Path) -> None:
    file = write(tmp_path / "a.yaml", "train: {epochs: 1}\nseed: 7\nrun: {name: 'lr-${optim.lr}-${seed}'}")
    assert load([file], ["optim.lr=0.5"]).run.name == "lr-0.5-7"
    with pytest.raises(UserError, match=r"'train\.epochs'"):
        load([file], ["train.epochs=${optim.name}"])


@pytest.mark.parametrize("file", sorted((REPO / "configs").glob("*.yaml")), ids=lambda file: file.name)
def test_each_config_that_comes_along_is_right(file: Path) -> None:
    assert load([file]).run.name == file.stem


def test_every_key_is_documented_and_every_choice_allowed() -> None:
    defaults = Config()
    for key, item, value in each_field(defaults):
        assert item.metadata["doc"].endswith("."), key
        assert get(defaults, key) == value
        for choice in item.metadata["choices"]:
            assert get(load([], ["train.epochs=1", f"{key}={choice}"]), key) == choice


def test_the_defaults_of_two_configurations_are_not_shared() -> None:
    one = Config()
    one.model.args["hidden"] = [1]
    one.data.mean.append(1.0)
    assert Config().model.args == {}
    assert Config().data.mean == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (500, Every(steps=500)),
        ("500", Every(steps=500)),
        ("1 step", Every(steps=1)),
        ("2 epochs", Every(epochs=2)),
        ("epoch", Every(epochs=1)),
        ("10 minutes", Every(seconds=600)),
        ("1 hour", Every(seconds=3600)),
        ("30 seconds", Every(seconds=30)),
        ("1 epoch, 10 minutes", Every(epochs=1, seconds=600)),
        ("100,2 epochs", Every(steps=100, epochs=2)),
        ("never", Every()),
        (0, Every()),
    ],
)
def test_intervals_are_read(text: int | str, expected: Every) -> None:
    assert Every.parse(text) == expected


@pytest.mark.parametrize("text", ["", "often", "2 weeks", "epochs 2", "-3", "1.5 epochs", "2 epochs and 3"])
def test_what_is_no_interval_is_refused_with_the_grammar(text: str) -> None:
    with pytest.raises(ValueError, match="2 epochs"):
        Every.parse(text)


def test_an_interval_is_due_at_its_multiples() -> None:
    def due(text: str) -> list[int]:
        return [step for step in range(1, 13) if Every.parse(text).due(step, steps_per_epoch=4)]

    assert due("3") == [3, 6, 9, 12]
    assert due("1 epoch") == [4, 8, 12]
    assert due("2 epochs, 5") == [5, 8, 10]
    assert due("never") == due("1 minute") == []


@pytest.mark.parametrize(
    ("word", "known", "expected"),
    [
        ("optim.lrr", ["optim.lr", "optim.name"], " (did you mean 'optim.lr'?)"),
        ("Resnet18", ["resnet18", "resnet50"], " (did you mean 'resnet18'?)"),
        ("lr", ["optim.lr", "seed"], " (did you mean 'optim.lr'?)"),
        ("xyz", ["optim.lr", "seed"], ""),
        ("a", [], ""),
    ],
)
def test_the_nearest_word_is_proposed_or_none(word: str, known: list[str], expected: str) -> None:
    assert nearest(word, known) == expected


def test_a_typo_in_any_key_is_answered_with_the_right_key() -> None:
    for key in all_keys():
        section, dot, name = key.rpartition(".")
        if len(name) < 4:
            continue
        typo = f"{section}{dot}{name[:-2]}{name[-1]}{name[-2]}x"  # two letters swapped, one too many
        with pytest.raises(UserError) as caught:
            load([], [f"{typo}=1"])
        assert f"did you mean '{key}'?" in str(caught.value)


def test_mistakes_in_nested_dicts_are_told_as_well() -> None:
    with pytest.raises(
        UserError, match=r"config: there is no key 'train.epoch' \(did you mean 'train.epochs'"
    ):
        from_mapping({"train": {"epoch": 1}})
    with pytest.raises(UserError, match="'seed' must be a whole number, not 'x'"):
        from_mapping({"seed": "x"})


def test_the_configuration_is_made_of_plain_dataclasses() -> None:
    config = load([], ["train.epochs=1", "optim.args.betas=[0.9,0.95]"])
    assert type(config) is Config
    assert type(config.optim.args["betas"]) is list
    assert dataclasses.replace(config, seed=5).seed == 5
