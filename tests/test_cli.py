"""The command line: help at once, one command for each thing to do, and exit codes that can be relied on."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dist_train
from dist_train.importing import importing
from tests.processes import Finished, one_after_the_other
from tests.worlds import SMALL

COMMANDS = ["train", "eval", "predict", "config", "summary", "samples", "replay", "verify",
            "submit", "sweep", "status", "doctor"]  # fmt: skip
NEEDLESS = ["torchvision", "PIL", "wandb", "matplotlib", "pandas", "scipy", "rich", "typer", "pydantic"]
HEAVY = ["torch", "accelerate", *NEEDLESS[:6]]


@pytest.mark.parametrize(
    "words",
    [["--help"], ["train", "--help"], ["--version"], ["config", "train.epochs=1"], ["train", "optm.lr=1"]],
)
def test_what_needs_no_torch_does_not_import_it(words: list[str], run: Callable[..., Finished]) -> None:
    program = (
        f"import sys; sys.argv = ['dist-train', *{words}]\n"
        "from dist_train.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        f"print('heavy:', [name for name in {HEAVY} if name in sys.modules])"
    )
    result = run("-c", program)
    assert result.out.splitlines()[-1] == "heavy: []", result


@pytest.mark.long
def test_imports_wait_until_they_are_needed(run: Callable[..., Finished]) -> None:
    """Half a second for torchvision, one for W&B: a start is as quick as what it doesn't import."""
    program = (
        "import sys, dist_train; assert 'torch' not in sys.modules\n"
        "from dist_train import Config, UserError, load; assert 'torch' not in sys.modules\n"
        "from dist_train import fit; assert 'torch' in sys.modules\n"
        "print(sorted(dist_train.__all__))\n"
        "try:\n    dist_train.fitt\nexcept AttributeError as error:\n    print(error)\n"
        "before = set(sys.modules)\n"
        "quickstart = {'train': {'steps': 2}, 'log': {'every': 1}, 'wandb': {'mode': 'disabled'}}\n"
        "fit(quickstart | {'device': 'cpu'}, on_row=lambda row: False)\n"
        f"print([name for name in {[*NEEDLESS]} if name in sys.modules])\n"
        "print(len([name for name in set(sys.modules) - before if name.startswith('torch.')]) < 30)\n"
    )
    result = run("-c", program)
    assert result.rc == 0, result
    assert result.out.splitlines() == [
        "['Config', 'UserError', 'fit', 'load']",
        "module 'dist_train' has no attribute 'fitt'",
        "[]",  # of what the quickstart does not need
        "True",  # nearly all of torch came with `fit`, while the commands have Python's collector off
    ]


def test_the_collector_rests_while_modules_are_imported() -> None:
    before = gc.get_freeze_count()
    try:
        with pytest.raises(ModuleNotFoundError), importing():
            assert not gc.isenabled()
            import dist_train.nowhere  # noqa: F401
        assert gc.isenabled()
        assert gc.get_freeze_count() > before
    finally:
        gc.unfreeze()


def test_help_tells_every_command_and_how_to_override(cli: Callable[..., Finished]) -> None:
    result = cli("--help")
    assert result.rc == 0, result
    for command in COMMANDS:
        assert command in result.out
        shown = cli(command, "-h")
        assert shown.rc == 0, shown
        assert "Usage" in shown.out
    assert "optim.lr=0.1" in result.out
    assert cli().out.split() == result.out.split()


def test_the_version_is_the_package_s(cli: Callable[..., Finished]) -> None:
    result = cli("--version")
    assert (result.rc, result.out) == (0, f"{dist_train.__version__}\n")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["trian"], "trian"),
        (["train"], "CONFIG"),
        (["train", "--epochs", "3"], "--epochs"),
        (["predict", "runs/x"], "inputs"),
        (["samples", "train.epochs=1", "--count", "0"], "count"),
    ],
)
def test_wrong_usage_is_exit_code_2(words: list[str], told: str, cli: Callable[..., Finished]) -> None:
    result = cli(*words)
    assert result.rc == 2, result
    assert told in result.err or told.upper() in result.err, result
    assert "Traceback" not in result.err


def test_mistakes_of_other_commands_are_one_sentence_too(npz: Path, tmp_path: Path) -> None:
    mistakes: list[tuple[list[str], str]] = [
        (["predict", "runs/nowhere", "a.png"], "runs/nowhere: there is no such run"),
        (["predict", ".", "a.png"], "holds no checkpoint"),
        (["predict", "arrays.npz", "a.png"], "arrays.npz"),
        (["predict", "runs/x", "a.png", "--format", "jsn"], "'json'?"),
        (["eval", "runs/nowhere"], "runs/nowhere: there is no such run"),
        *(
            ([*words, "--out", "nowhere/a"], "--out: nowhere/a: there is no folder nowhere.")
            for words in (
                ["samples", *SMALL],
                ["explain", *SMALL],
                ["find-lr", *SMALL],
                ["predict", "run", "a.png"],
                ["replay", "run", "1"],
                ["report", "run"],
                ["export", "run"],
            )
        ),
        (["summary", *SMALL, "model.name=mlpp"], "'mlp'?"),
    ]
    results = one_after_the_other([(tmp_path, words) for words, _ in mistakes])
    for result, (_, told) in zip(results, mistakes, strict=True):
        assert result.rc == 2, result
        assert told in result.err
        assert (result.err.count("\n"), result.err.startswith("dist-train: ")) == (1, True), result


def test_samples_are_drawn_as_read_and_as_the_model_sees_them(
    cli: Callable[..., Finished], image_folder: Path, tmp_path: Path
) -> None:
    words = [f"data.root={image_folder}", "data.name=image_folder", "data.mean=[0.5]", "data.std=[0.2]"]
    result = cli("samples", *SMALL, *words, "--count", 5, "--output", "five.png")
    assert (result.rc, result.out) == (0, "written: five.png\n"), result
    picture = np.asarray(Image.open(tmp_path / "five.png").convert("L"))
    assert picture.shape[1] > 5 * 100
    assert picture.std() > 20  # not an empty page
