"""What a file from elsewhere may not do: the names, sizes, paths and texts in it (docs/security.md)."""

from __future__ import annotations

import json
import shutil
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from dist_train import fit, load
from dist_train.checkpoint import load as load_checkpoint
from dist_train.config import UserError, from_file
from dist_train.predict import evaluate_run, load_model, predict, write
from dist_train.tools.replay import replay, table
from tests.processes import Finished, one_after_the_other
from tests.worlds import SMALL, pictures, write_npz

RUN = Path("runs/run")
HOSTILE = "import pathlib\npathlib.Path('ran').touch()\nNet = Task = Sgd = Data = print\n"


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of a small MLP, a picture, and a module that must not be imported."""
    folder = tmp_path_factory.mktemp("victim")
    write_npz(folder)
    (folder / "hostile.py").write_text(HOSTILE)
    Image.fromarray(pictures(1)[0][0]).save(folder / "picture.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("OMP_NUM_THREADS", "1")
        fit(load([], [*SMALL, f"data.root={folder}/arrays.npz", "model.args.hidden=[4]", "log.every=12"]))
    return folder


@pytest.fixture
def world(victim: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the current folder."""
    shutil.copytree(victim, tmp_path, dirs_exist_ok=True, symlinks=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    for key, value in changes.items():
        *sections, name = key.split(".")
        holder = values
        for section in sections:
            holder = holder[section]
        holder[name] = value
    return values


def rewrite(changes: dict[str, Any]) -> None:
    """Changes keys of the configuration in all files of the run that hold it."""
    for path in (RUN / "checkpoints").glob("step-*.pt"):
        state = torch.load(path, weights_only=True)
        torch.save({**state, "config": changed(state["config"], changes)}, path)
    (RUN / "attempts.jsonl").unlink(missing_ok=True)
    text = changed(yaml.safe_load((RUN / "config.yaml").read_text()), changes)
    (RUN / "config.yaml").write_text(yaml.safe_dump(text))


def predicted(**options: Any) -> Any:
    return predict(RUN, [Path("picture.png")], **options)


COMMANDS: dict[str, Callable[..., Any]] = {
    "load_model": lambda **options: load_model(RUN, **options),
    "predict": predicted,
    "eval": lambda **options: evaluate_run(RUN, **options),
    "replay": lambda **options: replay(RUN, 11, **options),
}
TOUCH = {"command": "touch ran"}
# key -> what it is set to, the arguments that go with it, and the commands that would follow it
NAMES: list[tuple[str, Any, dict[str, Any], str]] = [
    ("model.name", "os:system", TOUCH, "load_model predict eval replay"),
    ("model.name", "hostile:Net", {}, "predict"),
    ("model.name", "torch:load", {"f": "x.pt"}, "predict"),
    ("model.name", "torch.hub:load", {"repo_or_dir": "x", "source": "local"}, "predict"),
    ("model.name", "torch.utils.cpp_extension:load", {}, "predict"),
    ("model.name", "torchvision.io:write_file", {}, "predict"),
    ("model.name", "timm.models:load_checkpoint", {}, "predict"),
    ("model.name", "dist_train.cluster.submit:submit", {"words": ["touch", "ran"]}, "predict"),
    ("model.name", "torch.nn:functional", {}, "predict"),
    ("data.name", "os:system", TOUCH, "eval replay"),
    ("data.name", "hostile:Data", {}, "eval"),
    ("task.name", "os:system", TOUCH, "eval replay"),
    ("optim.name", "hostile:Sgd", {}, "replay"),
    ("schedule.name", "os:system", TOUCH, "replay"),
    ("data.target_transform", "hostile:Net", {}, "eval replay"),
    ("data.eval_transform", ["hostile:Net"], {}, "predict eval replay"),
    ("data.eval_transform", [{"os:system": TOUCH}], {}, "predict eval replay"),
    ("data.train_transform", [{"os:system": TOUCH}], {}, "replay"),
]


@pytest.mark.parametrize(
    ("key", "name", "args", "command"),
    [(key, name, args, command) for key, name, args, commands in NAMES for command in commands.split()],
)
def test_a_name_in_a_file_is_refused_before_anything_of_it_is_imported(
    key: str, name: Any, args: dict[str, Any], command: str, world: Path
) -> None:
    section = key.partition(".")[0]
    rewrite({key: name} | ({f"{section}.args": args} if key.endswith("name") else {}))
    with pytest.raises(UserError) as caught:
        COMMANDS[command]()
    text = name if isinstance(name, str) else next(iter(name[0])) if isinstance(name[0], dict) else name[0]
    for word in (key, f"'{text}'", "--trust", "trust=True"):
        assert word in str(caught.value)
    assert not Path("ran").exists()
    assert "hostile" not in sys.modules


@pytest.mark.parametrize("command", COMMANDS)
def test_who_trusts_a_file_gets_what_it_names(command: str, world: Path) -> None:
    (world / "mine_too.py").write_text(
        "from dist_train.models import mlp\nfrom torch import nn\n"
        "def net(input_shape, num_classes):\n    return mlp(input_shape, num_classes, [4])\n"
    )
    rewrite({"model.name": "mine_too:net", "model.args": {}})
    with pytest.raises(UserError, match="mine_too:net"):
        COMMANDS[command]()
    COMMANDS[command](trust=True)
    if command == "eval":  # what the user names needs no trust
        evaluate_run(RUN, ["model.name=mine_too:net"])


def test_who_names_what_a_file_names_does_not_vouch_for_its_arguments(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by `eval RUN model.name=...` nor as the student of such a teacher."""
    monkeypatch.setenv("SECRET", "told")
    monkeypatch.syspath_prepend(world)
    (world / "mine_too.py").write_text(
        "from dist_train.models import mlp\n"
        "def net(input_shape, num_classes, says=''):\n"
        "    assert says != 'told'\n    return mlp(input_shape, num_classes, [4])\n"
    )
    rewrite({"model.name": "mine_too:net", "model.args": {"says": "${oc.env:SECRET}"}})
    told = r"'model.args.says' is .*nothing is looked up"
    with pytest.raises(UserError, match=told):
        evaluate_run(RUN, ["model.name=mine_too:net"])
    student = [*SMALL, "run.name=student", "model.name=mine_too:net", f"task.teacher={RUN}", "train.steps=1"]
    with pytest.raises(UserError, match=told):
        fit(load([], [*student, "model.args={}"]))
    rewrite({"model.args": {}})
    evaluate_run(RUN, ["model.name=mine_too:net", "model.args.says=mine"])
    assert fit(load([], [*student, "model.args={}"])).step == 1


def test_the_commands_take_trust_and_tell_a_refusal_in_one_sentence(world: Path) -> None:
    rewrite({"model.name": "hostile:Net"})
    results = one_after_the_other(
        [
            (world, words)
            for words in (
                ["predict", RUN, "picture.png"],
                ["eval", RUN],
                ["replay", RUN, 11],
                ["predict", RUN, "picture.png", "--trust"],
            )
        ]
    )
    for result in results[:3]:
        assert (result.rc, result.out, result.err.count("\n")) == (2, "", 1), result
        assert "'hostile:Net'" in result.err and "--trust" in result.err
    assert results[3].rc and (world / "ran").exists()  # it was run


def test_classes_that_run_nothing_of_others_need_no_trust(world: Path) -> None:
    rewrite(
        {
            "task.name": "dist_train.tasks:Classification",
            "optim.name": "torch.optim:SGD",
            "data.eval_transform": [{"torchvision.transforms.v2:Resize": {"size": [8, 8]}}],
        }
    )
    predicted()
    evaluate_run(RUN)
    replay(RUN, 11)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data.name": "LSUN", "data.root": "."}, "data.root  LSUN"),
        ({"data.name": "ImageNet", "data.root": "."}, "data.root  ImageNet"),
        ({"data.workers": 10**6}, "data.workers  1,000,000"),
        ({"threads": 10**6}, "threads  1,000,000"),
        ({"eval.batch_size": 10**12}, "eval.batch_size"),
        ({"data.eval_transform": [{"Pad": {"padding": 10**6}}]}, "data.eval_transform[0]  Pad"),
        ({"data.root": "${oc.env:PATH}"}, "data.root  ${oc.env:PATH}"),
        ({"model.name": "${run.name}", "run.name": "os:system"}, "model.name  ${run.name}"),
        ({"model.args": {"hidden": [10**12]}}, "model"),
        ({"model.args": {"hidden": [2**20, 2]}}, "far larger than the weights"),
        (
            {"model.name": "timm/resnet18", "model.args": {"checkpoint_path": "x"}},
            "model.args.checkpoint_path",
        ),
        ({"model.name": "timm/resnet18", "model.args": {"model_name": "hf-hub:x"}}, "model.args.model_name"),
        ({"data.args": {"root": "x"}}, "data.args.root"),
        ({"model": "x"}, "model"),
        ({"data.mean": {"a": 1}}, "data.mean"),
    ],
)
def test_sizes_folders_and_secrets_that_a_file_may_not_ask_for(
    changes: dict[str, Any], words: str, world: Path
) -> None:
    rewrite(changes)
    with pytest.raises(UserError) as caught:
        evaluate_run(RUN)
    for word in words.split("  "):
        assert word in str(caught.value)


def test_a_configuration_nested_without_end_is_a_sentence(world: Path) -> None:
    nested: dict[str, Any] = {}
    for _ in range(5000):
        nested = {"a": nested}
    with pytest.raises(UserError, match="nested too deeply"):
        from_file({"model": {"args": nested}}, RUN, needed=["model."])


def test_what_is_not_needed_is_not_looked_up(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of one's own whose recipe takes a path from the environment, on a machine without it."""
    rewrite({"data.root": "${oc.env:NOT_HERE}", "wandb.notes": "${oc.env:NOT_HERE}"})
    predicted()
    with pytest.raises(UserError, match=r"data\.root"):
        evaluate_run(RUN)
    evaluate_run(RUN, ["data.root=arrays.npz"])
    monkeypatch.setenv("NOT_HERE", "arrays.npz")
    evaluate_run(RUN, trust=True)


def test_nothing_is_downloaded_or_written_where_a_file_says(
    world: Path, monkeypatch: pytest.MonkeyPatch, files: Callable[[Path], Any]
) -> None:
    from dist_train.data import fashion_mnist as source

    def download(target: Path) -> bool:
        raise AssertionError(f"into {target}")

    monkeypatch.setattr(source, "_download_fashion_mnist", download)
    monkeypatch.setattr(source, "DEBIAN", Path("nowhere"))
    rewrite(
        {
            "data.name": "fashion_mnist",
            "data.root": "target",
            "data.args": {"download": True},
            "run.dir": "elsewhere",
            "wandb.mode": "online",
        }
    )
    before = files(world)
    with pytest.raises(UserError):  # other classes, and a model for other images
        evaluate_run(RUN)
    rewrite({"data.name": "MNIST"})
    with pytest.raises(UserError, match="MNIST could not be opened"):
        evaluate_run(RUN)
    predicted()
    after = files(world)
    assert {name for name in after if name not in before} == set()


def save(state: Any) -> Path:
    torch.save(state, "evil.pt")
    return Path("evil.pt")


@pytest.mark.parametrize(
    "content",
    [
        {"format": 1},
        {"format": "1"},
        "x",
        [],
        {"classes": "abc"},
        {"classes": [1]},
        {"sample_shape": [1, 0, 8]},
        {"sample_shape": ["1", 8, 8]},
        {"config": []},
        {"config": {"model": {"name": 1}}},
        {"config": {}},
        {"model": None},
        {"model": {"1.weight": "x"}},
        {"model": {1: torch.zeros(1)}},
        {"average": 3},
        {"sample_shape": [1, 10**5, 10**5]},
        {"sample_shape": [1, 10**9, 10**9]},
        {"sample_shape": []},
        {"sample_shape": [7, 8, 8]},
        {"parts": 0},
        {"parts": -4},
        {"world_size": 0},
        {"window": {"loss": "text"}},
        {"window": {"loss": [None]}},
    ],
    ids=str,
)
def test_a_file_that_is_no_checkpoint_is_a_sentence(content: Any, world: Path) -> None:
    if isinstance(content, dict) and "format" not in content:
        content = load_checkpoint((RUN / "checkpoints/last.pt").resolve()) | content
    path = save(content)
    with pytest.raises(UserError):
        predict(path, [Path("picture.png")])


def test_a_file_that_would_grow_when_it_is_read_is_refused(world: Path) -> None:
    path = save(
        load_checkpoint((RUN / "checkpoints/last.pt").resolve()) | {"metrics": {"x": torch.zeros(10**6)}}
    )
    with zipfile.ZipFile(path) as stored, zipfile.ZipFile("bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in stored.namelist():
            bomb.writestr(name, stored.read(name))
    assert Path("bomb.pt").stat().st_size < path.stat().st_size / 10
    with pytest.raises(UserError, match="would grow"):
        predict("bomb.pt", [Path("picture.png")])


STEERING = "\x1b]0;title\x07\x1b[31mred\r\x9b2J‮"


def test_nothing_in_a_file_or_a_name_steers_the_terminal(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = load_checkpoint((RUN / "checkpoints/last.pt").resolve())
    path = save(state | {"classes": [STEERING, "b", "c" + STEERING]})
    picture = world / f"a{STEERING}.png"
    shutil.copy("picture.png", picture)
    rows, _ = predict(path, [picture])
    for form in ("table", "csv", "json"):
        write(rows, form, None)
    shown = capsys.readouterr().out
    assert "red" in shown and r"\x1b" in shown
    assert all(c.isprintable() or c == "\n" for c in shown)


def test_commands_print_names_that_would_steer_the_terminal_escaped(world: Path) -> None:
    folder = world / "runs" / f"x{STEERING.replace('/', '')}"
    folder.mkdir()
    (folder / "status.json").write_text(json.dumps({"state": STEERING, "reason": STEERING, "step": 1}))
    rewrite({"model.name": f"os:{STEERING}"})
    commands: Sequence[Sequence[Any]] = (
        ["status"], ["predict", RUN, "picture.png"], ["predict", folder, "picture.png"],
        ["config", "train.steps=1", f"run.name={STEERING}"], ["eval", f"no{STEERING}"],
    )  # fmt: skip
    results: list[Finished] = one_after_the_other([(world, words) for words in commands])
    for result in results:
        assert {c for c in result.out + result.err if not c.isprintable()} <= {"\n"}, result
    assert r"\x1b" in results[0].out
    for result in results[1:]:
        assert result.rc == 2 and r"\x1b" in result.err, result


def test_the_samples_of_a_replayed_step_are_printed_escaped(world: Path) -> None:
    from dataclasses import replace

    replayed = replay(RUN, 11)
    samples = [replace(seen, label=STEERING, path=STEERING) for seen in replayed.samples]
    assert all(c.isprintable() or c == "\n" for c in table(replace(replayed, samples=samples)))


def test_a_run_of_ones_own_goes_on_without_a_word_of_trust(
    here: Callable[..., Any], small: list[str], tmp_path: Path
) -> None:
    (tmp_path / "own_net.py").write_text(
        "from dist_train.models import mlp\n"
        "def net(input_shape, num_classes):\n    return mlp(input_shape, num_classes, [4])\n"
    )
    assert here(*small, "model.name=own_net:net", "train.steps=6").step == 6
    assert here(*small, "model.name=own_net:net").step == 12
    other = [*small, "run.name=other", "resume=runs/run/checkpoints/last.pt", "train.steps=14"]
    rewrite({"model.name": "os:system", "model.args": TOUCH})  # compared, not followed
    assert here(*other, "model.name=own_net:net").step == 14
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "forged",
    [
        {"processes": 0},
        {"processes": -1},
        {"parts": 0},
        {"parts": -4},
        {"parts": "4"},
        {"config": {"resume": 7}},
    ],
)
def test_a_record_of_attempts_that_can_be_none_is_told(forged: dict[str, Any], world: Path) -> None:
    file = RUN / "attempts.jsonl"
    line = json.loads(file.read_text().splitlines()[0])
    file.write_text(json.dumps(line | forged) + "\n")
    with pytest.raises(UserError, match="not the record of a run's attempts"):
        replay(RUN, 12)
