"""The configuration: files and arguments merged in order, checked, and printed so that it reads back."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dist_train.config import (
    Config,
    Every,
    UserError,
    changes,
    from_file,
    from_mapping,
    get,
    load,
    nearest,
    to_mapping,
    to_yaml,
)
from dist_train.config.objects import construct
from dist_train.config.schema import all_keys, each_key
from tests.processes import REPO, Finished


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


# Sweeps are of W&B's format.
RECIPES = sorted(file for file in (REPO / "configs").rglob("*.yaml") if file.parent.name != "sweeps")


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.name)
def test_each_config_that_comes_along_is_right(file: Path) -> None:
    assert load([file]).run.name == file.stem


def test_every_key_is_documented_and_every_choice_allowed() -> None:
    defaults = Config()
    for key, rule, value in each_key(defaults):
        assert rule.doc.endswith("."), key
        assert get(defaults, key) == value
        for choice in rule.choices:
            assert get(load([], ["train.epochs=1", f"{key}={choice}"]), key) == choice


def test_the_limits_of_every_key_are_kept() -> None:
    for key, rule, _ in each_key(Config()):
        length = [] if key in ("train.epochs", "train.steps") else ["train.epochs=1"]
        if rule.least is not None:
            assert get(load([], [*length, f"{key}={rule.least}"]), key) == rule.least
            with pytest.raises(UserError, match=f"'{key}' must be at least {rule.least}, not "):
                load([], [*length, f"{key}={rule.least - 1}"])
        if rule.below is not None:
            with pytest.raises(UserError, match=f"'{key}' must be below {rule.below}, not "):
                load([], [*length, f"{key}={rule.below}"])


def test_a_file_from_elsewhere_may_not_ask_for_more_than_the_greatest_size() -> None:
    limited = [(key, rule.most_from_file) for key, rule, _ in each_key(Config()) if rule.most_from_file]
    assert {"train.batch_size", "eval.batch_size", "data.workers", "threads"} <= {key for key, _ in limited}
    for key, most in limited:
        *section, name = key.split(".")
        for size in (most, most + 1):
            values: dict[str, Any] = {"train": {"steps": 1}}
            (values.setdefault(section[0], {}) if section else values)[name] = size
            if size == most:
                assert get(from_file(values, Path("a.pt"), needed=[""]), key) == most
                continue
            with pytest.raises(UserError, match=rf"{key}: {size:,}(\.0)? is more than a file from elsewhere"):
                from_file(values, Path("a.pt"), needed=[""])


def test_a_key_may_change_when_its_section_or_the_key_itself_says_so() -> None:
    may = {key for key, rule, _ in each_key(Config()) if rule.may_change}
    assert {"log.every", "wandb.tags", "data.root", "threads", "train.steps"} <= may
    assert not {"seed", "optim.lr", "train.batch_size", "data.args", "model.name", "precision"} & may
    before = to_mapping(load([], ["train.steps=1"]))
    found = changes(before, to_mapping(load([], ["train.steps=2", "optim.lr=1.0"])))
    assert [(str(change), change.is_allowed) for change in found] == [
        ("optim.lr: 0.001 -> 1.0", False),
        ("train.steps: 1 -> 2", True),
    ]


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


# --- later sources ------------------------------------------------------------------------------------


def said_by(paths: list[Path], words: list[str]) -> tuple[Config, list[str]]:
    said: list[str] = []
    return load(paths, words, said.append), said


@pytest.mark.parametrize(
    ("section", "old", "new", "args"),
    [
        ("model", "resnet18", "my:net", {"weights": "DEFAULT"}),
        ("optim", "SGD", "AdamW", {"momentum": 0.9}),
        ("schedule", "one_cycle", "cosine", {"rise": 0.2}),
        ("task", "classification", "my:Task", {"label_smoothing": 0.1}),
        ("data", "csv", "image_folder", {"annotations_file": "a.csv"}),
    ],
)
def test_a_name_that_is_changed_drops_the_arguments_of_the_former_and_says_so(
    section: str, old: str, new: str, args: dict[str, object], tmp_path: Path
) -> None:
    text = to_yaml(from_mapping({"train": {"epochs": 1}, section: {"name": old, "args": args}}))
    file = write(tmp_path / "a.yaml", text)
    config, said = said_by([file], [f"{section}.name={new}"])
    assert (get(config, f"{section}.name"), get(config, f"{section}.args")) == (new, {})
    (line,) = said
    for word in (f"{section}.name", old, new, *args):
        assert word in line
    other = write(tmp_path / "b.yaml", f"{section}: {{name: '{new}'}}")
    assert said_by([file, other], [])[0] == config
    same, nothing = said_by([file], [f"{section}.name={old}"])
    assert (get(same, f"{section}.args"), nothing) == (args, [])


def test_the_last_name_of_a_source_decides_whether_arguments_are_dropped(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("train: {epochs: 1}\nmodel: {name: mlp, args: {hidden: [8]}}\n")
    config = load([tmp_path / "a.yaml"], ["model.name=cnn", "model.name=mlp"])
    assert (config.model.name, config.model.args) == ("mlp", {"hidden": [8]})


def test_arguments_that_come_with_the_new_name_stay_in_any_order(tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.yaml",
        "train: {epochs: 1}\ndata: {root: x}\nmodel: {name: resnet18, args: {weights: DEFAULT}}",
    )
    words = ["model.args.width=3", "model.name=my:net", "data.name=csv"]
    for order in (words, words[::-1]):
        config, _ = said_by([file], order)
        assert (config.model.args, config.data.root) == ({"width": 3}, "x")


def test_an_empty_mapping_clears_and_a_tilde_takes_a_key_away(tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.yaml",
        "train: {epochs: 3}\nmodel: {args: {hidden: [3], deep: {one: 1, two: 2}}}\noptim: {lr: 0.5}",
    )
    assert load([file], ["model.args={}"]).model.args == {}
    assert load([file], ["model.args={}", "model.args.dropout=0.1"]).model.args == {"dropout": 0.1}
    assert load([file, write(tmp_path / "b.yaml", "model: {args: {}}")]).model.args == {}
    assert load([file, write(tmp_path / "c.yaml", "model: {}")]).model.args != {}
    assert load([file], ["model.args.deep={}"]).model.args == {"hidden": [3], "deep": {}}
    assert load([file], ["~model.args.hidden"]).model.args == {"deep": {"one": 1, "two": 2}}
    assert load([file], ["~model.args.deep.one"]).model.args["deep"] == {"two": 2}
    assert load([file], ["model.name=cnn", "~model.args.hidden"]).model.args == {}
    assert load([file], ["model.args.x=1", "~model.args.x"]) == load([file])
    assert load([file], ["~optim.lr"]).optim.lr == Config().optim.lr
    assert load([file], ["~optim"]).optim == Config().optim
    with pytest.raises(UserError, match=r"'~model.args.hiden': .*did you mean 'model.args.hidden'"):
        load([file], ["~model.args.hiden"])
    with pytest.raises(UserError, match=r"'~modl': .*"):
        load([file], ["~modl"])


def test_words_with_a_tilde_are_overrides_in_every_command(
    tmp_path: Path, cli: Callable[..., Finished]
) -> None:
    write(tmp_path / "a.yaml", "train: {epochs: 3}\nmodel: {args: {hidden: [3]}}")
    write(tmp_path / "sweep.yaml", "method: grid\nparameters: {seed: {values: [1, 2]}}")
    shown = cli("config", "~model.args.hidden", "a.yaml")
    assert shown.rc == 0 and "hidden" not in shown.out, shown
    submitted = cli("submit", "a.yaml", "~model.args.hidden", "--dry-run")
    assert submitted.out.rstrip().endswith("'~model.args.hidden'"), submitted
    task = cli("sweep", "sweep.yaml", "a.yaml", "~model.args.hidden", "--task", 0)
    assert task.out.splitlines()[:2] == ["a.yaml", "~model.args.hidden"], task


def test_the_length_of_the_run_is_what_a_later_source_says(tmp_path: Path) -> None:
    epochs = write(tmp_path / "epochs.yaml", "train: {epochs: 3}")
    steps = write(tmp_path / "steps.yaml", "train: {steps: 7}")

    def length(*files: Path, words: tuple[str, ...] = ()) -> tuple[int | None, int | None]:
        train = load(files, words).train
        return train.epochs, train.steps

    assert length(epochs, words=("train.steps=1",)) == (None, 1)
    assert length(steps, words=("train.epochs=2",)) == (2, None)
    assert (length(epochs, steps), length(steps, epochs)) == ((None, 7), (3, None))
    assert length(epochs, words=("train.steps=null",)) == (3, None)
    with pytest.raises(UserError, match="both set"):
        length(words=("train.steps=1", "train.epochs=1"))


def test_an_option_that_is_a_key_is_answered_with_the_key(cli: Callable[..., Finished]) -> None:
    for words in (["--lr", "0.1"], ["--lr=0.1"], ["--optim.lr", "0.1"]):
        result = cli("train", *words)
        assert (result.rc, result.out) == (2, "")
        option = words[0].partition("=")[0]
        assert result.err == f"dist-train: there is no option '{option}'; write optim.lr=0.1.\n"
    assert "No such option" in cli("train", "--xyz").err


# --- interpolations -----------------------------------------------------------------------------------

SECRET = "a3Tu9-very-secret"


def test_what_comes_from_the_environment_is_used_but_recorded_as_it_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TOKEN", SECRET)
    config = load(
        [],
        [
            "train.epochs=1",
            "wandb.notes=${oc.env:TOKEN}",
            "data.args.token=${oc.env:TOKEN}",
            "data.args.header=Bearer ${data.args.token}",
            "data.args.list=[a,'${oc.env:TOKEN}']",
            "model.args=${data.args}",
            "eval.batch_size=${train.batch_size}",
        ],
    )
    assert config.data.args == {"token": SECRET, "header": f"Bearer {SECRET}", "list": ["a", SECRET]}
    assert config.model.args == config.data.args
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, name="again"))
    recorded = to_mapping(config)
    assert recorded["wandb"]["notes"] == "${oc.env:TOKEN}"
    assert recorded["data"]["args"]["header"] == "Bearer ${data.args.token}"
    assert recorded["data"]["args"]["list"] == ["a", "${oc.env:TOKEN}"]
    assert recorded["eval"]["batch_size"] == 64  # no secret, so a number that programs can read
    assert recorded["run"]["name"] == "again"
    assert pickle.loads(pickle.dumps(config)).written == config.written
    for text in (str(recorded), to_yaml(config), repr(dataclasses.asdict(Config()))):
        assert SECRET not in text
    again = from_mapping(recorded)
    assert (again, to_mapping(again)) == (config, recorded)
    other = dataclasses.replace(config, wandb=dataclasses.replace(config.wandb, notes="mine"))
    assert to_mapping(other)["wandb"]["notes"] == "mine"


@pytest.mark.parametrize(
    "word",
    [
        "seed=${oc.env:TOKEN}",
        "run.name=../${oc.env:TOKEN}",
        "precision=${oc.env:TOKEN}",
        "eval.every=${oc.env:TOKEN}",
        "checkpoint.best=${oc.env:TOKEN}",
        "stop_after=${oc.env:TOKEN}",
        "data.mean=['${oc.env:TOKEN}']",
    ],
)
def test_a_mistake_shows_what_was_written_and_not_the_secret(
    word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKEN", SECRET)
    with pytest.raises(UserError) as caught:
        load([], ["train.epochs=1", word])
    assert SECRET not in str(caught.value)
    assert "${oc.env:TOKEN}" in str(caught.value)


@pytest.mark.parametrize(
    "name", ["x" * 300, "a/" + "ä" * 200, "a\0b", "a\x1b[31mb", ".", "./.", " ", "/tmp/x", "a/../b", "a\nb"]
)
def test_a_name_that_can_be_no_folder_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"'run\.name' must be a folder's name") as caught:
        from_mapping({"train": {"epochs": 1}, "run": {"name": name}})
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300
    with pytest.raises(UserError, match=r"'data\.root'"):
        from_mapping({"train": {"epochs": 1}, "data": {"root": "a\0b"}})


@pytest.mark.parametrize(
    "values", [{1: 2}, {"model": {"args": {"x": object()}}}, {"a": {"b": "${a}"}}, {"wandb": {"notes": "${"}}]
)
def test_whatever_a_mapping_holds_a_mistake_is_a_sentence(values: dict[object, object]) -> None:
    with pytest.raises(UserError):
        from_mapping({"train": {"epochs": 1}} | values)  # type: ignore[dict-item]


def test_a_secret_is_in_no_file_of_a_run_and_the_run_goes_on(
    here: Callable[..., Any], small: list[str], npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / SECRET).mkdir()
    npz.rename(tmp_path / SECRET / npz.name)
    monkeypatch.setenv("TOKEN", SECRET)
    words = [*small, f"data.root={tmp_path}/${{oc.env:TOKEN}}/{npz.name}"]
    result = here(*words, "log.batches=true")
    for file in (path for path in result.folder.rglob("*") if path.is_file()):
        assert SECRET.encode() not in file.read_bytes(), file
    assert "${oc.env:TOKEN}" in (result.folder / "config.yaml").read_text()
    assert here(*words, "train.steps=14").step == 14
    log = (result.folder / "log.txt").read_text()
    assert "changed: train.steps: 12 -> 14" in log
    assert "data.root" not in log
    with pytest.raises(UserError, match=r"data\.args: .* .*oc\.env:TOKEN"):
        here(*words, "data.args.classes=[a,'${oc.env:TOKEN}',c]")


def test_a_refusal_names_the_arguments_and_shows_no_value_of_theirs() -> None:
    def source(token: str, user: str = "") -> None:
        raise ValueError("not accepted")

    with pytest.raises(UserError) as error:
        construct(source, {"token": "s3cret", "user": "me"}, "data.args")
    assert str(error.value) == "data.args: source refused token, user: not accepted."
