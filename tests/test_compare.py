"""`dist-train compare`, on real runs: groups, differences, numbers, and who may be called better."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dist_train import cli, fit, load
from dist_train.config import UserError
from dist_train.tools.compare import files, groups
from dist_train.tools.compare.groups import Comparison, compare
from dist_train.tools.compare.runs import Run, choose_metric, find
from dist_train.tools.compare.show import show, smoothed
from tests.browser import Browser
from tests.worlds import SMALL, write_npz

RATES, SEEDS = (0.1, 0.01), (0, 1)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with runs/: two learning rates with two seeds each, 12 steps of 6 in an epoch."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("OMP_NUM_THREADS", "1")
        write_npz(folder)
        for rate in RATES:
            for seed in SEEDS:
                train(f"optim.lr={rate}", f"seed={seed}", f"run.name={rate}-{seed}")
    yield folder


def train(*words: str) -> Any:
    """A small run."""
    return fit(load([], [*SMALL, "log.every=2", "eval.every=4", "checkpoint.every=4", *words]))


@pytest.fixture
def runs(world: Path, monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """The runs of `world`, where the test is."""
    monkeypatch.chdir(world)
    return find(["runs/0.1-*", "runs/0.01-*"])


def recorded(folder: Path, name: str) -> list[float]:
    """All values of a metric in metrics.jsonl."""
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [line[name] for line in lines if name in line]


# --- what differs, and what came of it ---------------------------------------------------------------


def test_runs_that_differ_only_in_the_seed_are_one_group_and_only_differences_are_told(
    runs: list[Run], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compared = compare(runs)
    assert compared.keys == ["optim.lr"] and compared.metric == "eval/accuracy"
    assert [group.name for group in compared.groups] == ["optim.lr=0.1", "optim.lr=0.01"]
    assert [len(group.runs) for group in compared.groups] == [2, 2]
    told, errors = command(monkeypatch, capsys, "runs", "--metric", "eval/loss", "--out", tmp_path / "t.csv")
    assert f"written: {tmp_path}/t.csv" in told and "optim.lr=0.01" in told and errors == ""
    assert "seed" not in told.split("What came of it")[0] and "batch_size" not in told


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: Any) -> list[str]:
    """What `dist-train compare ...` prints, and what to stderr."""
    monkeypatch.setattr("sys.argv", ["dist-train", "compare", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capsys.readouterr()
    assert end.value.code == (2 if said.err else 0)
    return [said.out, said.err]


@pytest.mark.parametrize(
    ("metric", "best"), [("eval/loss", min), ("max eval/loss", max), ("eval/accuracy", max)]
)
def test_the_numbers_are_those_of_the_record(
    runs: list[Run], metric: str, best: Callable[..., float]
) -> None:
    name = metric.split()[-1]
    compared = compare(runs, metric)
    for group, rate in zip(compared.groups, RATES, strict=True):
        values = [recorded(Path(f"runs/{rate}-{seed}"), name) for seed in SEEDS]
        assert [value.last for value in group.values] == [column[-1] for column in values]
        bests = [best(column) for column in values]
        steps = [4 * (1 + column.index(one)) for column, one in zip(values, bests, strict=True)]
        assert [(value.best, value.best_step) for value in group.values] == list(
            zip(bests, steps, strict=True)
        )
        assert group.mean(lambda value: value.best) == (statistics.fmean(bests), statistics.stdev(bests))


def test_a_run_that_was_killed_counts_each_step_once(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    train("seed=7", "run.name=killed/b", "checkpoint.keep=9")
    shutil.copytree("runs/killed/b", "runs/killed/a")
    for step in (8, 12):
        (checkpoint,) = Path("runs/killed/a/checkpoints").glob(f"*{step:08}*")
        checkpoint.unlink()
    train("seed=7", "run.name=killed/a", "checkpoint.keep=9")  # as after a kill: steps 5 to 12 are done again
    one, other = find(["runs/killed"])
    assert len(recorded(Path(one.name), "train/loss")) == 6 + 4
    for name in ("train/loss", "eval/accuracy"):
        for a, b in zip(one.curve(name), other.curve(name), strict=True):
            assert a.tolist() == b.tolist()
    assert one.status["attempts"] == 2 and compare([one, other]).keys == []


def test_curves_go_over_steps_time_samples_and_epochs(runs: list[Run]) -> None:
    run = runs[0]
    assert run.curve("eval/loss", "step")[0].tolist() == [4, 8, 12]
    assert run.curve("eval/loss", "samples")[0].tolist() == [64, 128, 192]
    assert run.curve("eval/loss", "epoch")[0].tolist() == [4 / 6, 8 / 6, 2]  # 90 samples in batches of 16
    assert run.curve("eval/loss", "time")[0].tolist() == [
        row["time"] for row in run.rows if row["kind"] == "eval"
    ]
    longer = Run("epochs", {"train.epochs": 3}, run.rows, {"total_steps": 18})
    assert longer.curve("eval/loss", "epoch")[0].tolist() == [4 / 6, 8 / 6, 2]


def test_a_run_is_compared_once_by_whatever_way_it_is_named(world: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(world / "runs", target_is_directory=True)
    assert len(find([str(world / "runs"), str(tmp_path / "link")])) == len(find([str(world / "runs")]))


@pytest.mark.parametrize(("best", "more_is_better"), [(1.0, False), (3.0, True)])
def test_what_is_better_is_what_the_runs_called_best(best: float, more_is_better: bool) -> None:
    rows = [{"step": step, "eval/mae": value} for step, value in enumerate([2.0, 1.0, 3.0, 2.0])]
    run = Run("a", {}, rows, {"best": {"eval/mae": best}})
    assert choose_metric([run], "") == ("eval/mae", more_is_better)
    assert choose_metric([run], "max eval/mae") == ("eval/mae", True)


def test_smoothing_starts_at_the_first_value_and_forgets() -> None:
    assert smoothed(np.array([4.0, 4.0, 4.0]), 0.9) == pytest.approx([4, 4, 4])
    assert smoothed(np.array([1.0, 0.0]), 0.5) == pytest.approx([1, 1 / 3])
    assert smoothed(np.array([1.0, 5.0]), 0.0).tolist() == [1, 5]


# --- who is better ---------------------------------------------------------------------------------


def pair(differences: list[float], first: int = 0) -> Comparison:
    """Two recipes whose accuracies differ by so much, one seed each; the other has seeds from `first` on."""
    random = np.random.default_rng(0)
    made = []
    for number, difference in enumerate(differences):
        base = 0.5 + 0.1 * random.random()
        for rate, value, seed in ((0.1, base, number), (0.2, base + difference, number + first)):
            rows = [{"step": 1, "eval/accuracy": value}]
            made.append(Run(f"{rate}-{seed}", {"optim.lr": rate, "seed": seed}, rows, {}))
    return compare(sorted(made, key=lambda run: run.config["optim.lr"]), "eval/accuracy")


def test_better_is_said_only_where_shared_seeds_show_it() -> None:
    clear = [0.03, 0.035, 0.025, 0.03, 0.028]
    assert (
        "optim.lr=0.2 against optim.lr=0.1: better (+0.0296, p = 5.4e-05, 5 shared seeds)"
        in pair(clear).verdicts[0]
    )
    assert ": worse (-0.0296" in pair([-one for one in clear]).verdicts[0]
    assert ": no difference that can be told" in pair([0.03, -0.02, 0.01, 0.02, -0.03]).verdicts[0]
    assert "3 shared seeds: few" in pair(clear[:3]).verdicts[0]
    assert "not tested, 1 shared seed: a test needs two" in pair(clear[:2], first=1).verdicts[0]
    assert "not tested, 0 shared seeds" in pair(clear, first=9).verdicts[0]
    assert "the differences of all seeds are the same" in pair([0.0, 0.0]).verdicts[0]
    assert "Student's paired t test of the last eval/accuracy" in pair(clear).verdicts[-1]


@pytest.mark.parametrize(
    ("t", "freedom"), [(12.706, 1), (4.303, 2), (3.182, 3), (2.776, 4), (2.571, 5), (2.262, 9), (2.228, 10)]
)  # fmt: skip
def test_p_values_are_those_of_the_printed_tables(t: float, freedom: int) -> None:
    assert groups.student(t, freedom) == pytest.approx(0.05, abs=5e-5)
    x = np.linspace(0, 1.3, 100_001)  # and those of the density, integrated
    density = (1 + x * x / freedom) ** (-(freedom + 1) / 2)
    scale = math.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
    inside = 2 * scale * float((density[1:] + density[:-1]).sum()) * x[1] / 2
    assert groups.student(-1.3, freedom) == pytest.approx(1 - inside, abs=1e-8)


def test_holms_correction() -> None:
    # An example by hand: 0.01 x 4; 0.02 x 3; 0.03 x 2 is 0.06, and 0.04 x 1 can't be less.
    assert groups.holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert groups.holm([0.9, 0.8]) == [1.0, 1.0] and groups.holm([]) == []


# --- files -----------------------------------------------------------------------------------------


def test_the_page_opens_alone_and_its_curves_are_those_of_the_record(
    runs: list[Run], browser: Browser, tmp_path: Path
) -> None:
    files.write(compare(runs, "eval/loss", smooth=0.5), tmp_path / "a.html")
    browser.open(tmp_path / "a.html")
    text = browser.run("return document.body.innerText")
    for wanted in ("optim.lr=0.01", "What differs", "runs/0.1-0", "Student's paired t test"):
        assert wanted in text
    drawn = browser.run("return charts.map((chart) => chart.u.data.length - 1)")
    assert drawn == [8, 8]  # eval/loss and train/loss, of four runs each, measured and smoothed
    for number, rate in enumerate(RATES):
        for seed in SEEDS:
            at = 1 + 2 * (2 * number + seed)
            column = browser.run(f"return charts[1].u.data[{at}]")
            assert column == pytest.approx(recorded(Path(f"runs/{rate}-{seed}"), "train/loss"))
    shown = "return charts[0].u.series.filter((line) => line.show).length - 1"
    assert browser.run(shown) == 8
    browser.click(".legend button")  # one recipe with its two seeds
    assert browser.run(shown) == 4
    assert browser.said() == [] and browser.fetched() == []


def test_the_table_has_a_row_for_each_run_with_numbers_that_are_not_rounded(runs: list[Run]) -> None:
    table = list(csv.DictReader(io.StringIO(files.as_csv(compare(runs, "eval/loss")).decode())))
    assert [(row["run"], float(row["optim.lr"]), int(row["seed"])) for row in table] == [
        (f"runs/{rate}-{seed}", rate, seed) for rate in RATES for seed in SEEDS
    ]
    for row in table:
        assert float(row["last"]) == recorded(Path(row["run"]), "eval/loss")[-1]
        assert row["state"] == "completed"


def test_the_picture_is_drawn(runs: list[Run], tmp_path: Path) -> None:
    files.write(compare(runs, "train/loss", "time", smooth=0.5), tmp_path / "a.png")
    assert np.asarray(Image.open(tmp_path / "a.png").convert("L")).std() > 10


@pytest.mark.long
def test_twenty_curves_of_5000_points_make_a_page_below_5_megabytes(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    made = []
    for number in range(20):
        values = zip(random.random((5000, 3)).tolist(), np.cumsum(random.random(5000)).tolist(), strict=True)
        rows = [
            {"step": 1 + step, "time": time, "train/loss": a, "eval/loss": b, "eval/accuracy": c}
            for step, ((a, b, c), time) in enumerate(values)
        ]
        made.append(Run(f"run {number}", {"optim.lr": number}, rows, {}))
    # Three charts of 20 curves, of which no two have the same x.
    assert len(files.as_html(compare(made, "eval/accuracy", "time"))) < 5e6


@pytest.mark.parametrize("width", ["40", "80", "160"])
def test_curves_are_whole_on_a_terminal_of_any_width(
    width: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", width)
    rows = [{"step": step, "eval/loss": 1 / step} for step in range(1, 101)]
    show(compare([Run(str(n), {"data.root": f"some/where/{n}"}, rows, {}) for n in (1, 2)]))
    drawn = [line.split()[-1] for line in capsys.readouterr().out.splitlines() if "▁" in line]
    assert [len(line) for line in drawn] == [24, 24]


def test_curves_that_end_early_or_have_one_point_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"step": step, "eval/loss": 1 / step} for step in range(1, 101)]
    made = [Run(str(n), {"data.root": f"[b]{n}$"}, rows[:n], {}) for n in (100, 50, 1)]
    made[1].status.update(state="lost", step=50)
    compared = compare([*made, Run("none", {"seed": 1}, [], {})])
    show(compared)
    told = capsys.readouterr().out.splitlines()
    assert told[-1] == "not complete, so their last values are not those of the end: 50 (lost at step 50)."
    lines = {line.split()[0]: line.rstrip() for line in told if "▁" in line or "█" in line}
    assert len(lines["data.root=[b]100$"].split()[-1]) == 24
    assert len(lines["data.root=[b]50$"].split()[-1]) == 12
    assert lines["data.root=[b]1$"].endswith("█")
    assert compared.without == ["none"]
    assert b"left out" in files.as_html(compared) and len(files.as_png(compared)) > 1000


# --- W&B -------------------------------------------------------------------------------------------


class Api:
    """Stands for wandb.Api: what it gives for a run that was mirrored, with a step that was done again."""

    def run(self, path: str) -> Any:
        """A run, or the error that W&B has for one that isn't there."""
        if path != "me/project/abc":
            raise ValueError(f"Could not find run <Run {path}>\nand more")
        line = {
            "kind": "train",
            "epoch": 0,
            "_step": 0,
            "_runtime": 9.5,
            "eval/loss": None,
            "picture": {"a": 1},
        }
        rows = [
            {**line, "step": 2, "time": 1.0, "attempt": 1, "train/loss": 0.9},
            {**line, "step": 4, "time": 2.0, "attempt": 1, "train/loss": 0.8},
            {**line, "step": 4, "time": 3.0, "attempt": 2, "train/loss": 0.7},
        ]
        config = {"seed": 3, "optim": {"lr": 0.5, "args": {}}}
        summary = {"goodput": 0.8, "attempts": 2, "time": 3.0}
        return SimpleNamespace(
            config=config, summary=summary, state="finished", scan_history=lambda: iter(rows)
        )


def test_a_run_of_wandb_is_compared_with_one_of_a_folder(
    runs: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Api=Api))
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    compared = compare(find(["wandb:me/project/abc", "runs/0.1-0"]), "train/loss")
    there, here = compared.groups
    assert (there.values[0].last, there.values[0].best_step) == (0.7, 4)
    assert there.runs[0].curve("train/loss", "time")[0].tolist() == [1, 3]
    assert there.config["optim.lr"] == 0.5 and here.config["optim.lr"] == 0.1
    assert there.runs[0].seconds == 3.0 and there.runs[0].status["goodput"] == 0.8
    for word, told in (
        ("wandb:me/project/x", "can't read it: Could not find run"),
        ("wandb:abc", "is written wandb:"),
    ):
        with pytest.raises(UserError, match=told) as error:
            find([word])
        assert "\n" not in str(error.value)


def test_without_a_key_of_wandb_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace())
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(UserError, match=r"W&B knows no API key here; `wandb login` first"):
        find(["wandb:me/project/abc"])


# --- mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["runs/nowhere", "runs/0.1-0"], "runs/nowhere: there is no such run."),
        (["a/b/c"], "a/b/c: there is no such run; a run in W&B is written wandb:a/b/c."),
        (["runs/x*"], "runs/x*: there is no such run."),
        (["runs/0.1-0"], "compare: needs at least two runs, not only runs/0.1-0."),
        (["runs", "--metric", "eval/acuracy"],
         "no run has the metric 'eval/acuracy' (did you mean 'eval/accuracy'?); there are eval/accuracy, "),
        (["runs", "--metric", "most eval/loss"],
         "--metric: written as 'eval/accuracy' or 'max eval/accuracy', not 'most eval/loss'."),
        (["runs", "--x", "hours"], "--x: step, time, samples or epoch, not 'hours'."),
        (["runs", "--smooth", "1"], "--smooth: a weight from 0 to below 1, not 1."),
        (["runs", "--out", "a.pdf"], "--out: a.pdf: a file that ends in .html, .png, .csv."),
        (["runs", "--out", "nowhere/a.csv"], "--out: nowhere/a.csv: there is no folder nowhere."),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence(
    words: list[str],
    told: str,
    world: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(world)
    _, error = command(monkeypatch, capsys, *words)
    assert error.count("\n") == 1 and error.startswith(f"dist-train: {told}"), error


def test_runs_without_rows_and_a_full_disk_are_told(runs: list[Run], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a: no row of metrics has been written yet"):
        compare([Run("a", {}, [], {}), Run("b", {}, [], {})])
    with pytest.raises(UserError, match="can't be written: Is a directory"):
        (tmp_path / "a.csv").mkdir()
        files.write(compare(runs), tmp_path / "a.csv")
    with pytest.raises(UserError, match="its rows don't tell how many steps an epoch has; use --x samples"):
        Run("short", {}, [{"step": 3, "epoch": 0, "eval/loss": 1.0}], {}).curve("eval/loss", "epoch")
