"""Sweep files in W&B's format: each task a checked run, the same whoever computes it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml

from dist_train.cluster.sweep import draw, expand, pick, text
from dist_train.config import UserError, load
from dist_train.record.history import read_status
from dist_train.tools.sweep import of_seeds, results
from tests.processes import REPO, Finished

COMMAND = [
    "dist-train",
    "train",
    "recipe.yaml",
    "seed=3",
    "run.name=x-${oc.env:WANDB_RUN_ID}",
    "${args_no_hyphens}",
]
GRID = {
    "method": "grid",
    "command": COMMAND,
    "parameters": {
        "optim.lr": {"values": [0.1, 1.0e-5]},
        "model": {"parameters": {"args": {"parameters": {"hidden": {"values": [[16], [16, 8], []]}}}}},
        "schedule.name": {"value": "cosine"},
    },
}
RANDOM = {
    "method": "random",
    "run_cap": 5,
    "command": COMMAND,
    "parameters": {
        "optim.lr": {"distribution": "log_uniform_values", "min": 0.001, "max": 1.0},
        "train.batch_size": {"min": 8, "max": 64},
    },
}


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Path]:
    """write(content) -> tune.yaml in the current folder, beside recipe.yaml."""
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text("train: {epochs: 1}\n")

    def writer(content: Any) -> Path:
        path = Path("tune.yaml")
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
        return path

    return writer


def test_a_grid_is_each_combination_once_and_train_takes_it(write: Callable[[Any], Path]) -> None:
    tasks = expand(write(GRID))
    found = []
    for number, task in enumerate(tasks):
        assert task.arguments[0] == "recipe.yaml"
        config = load(task.arguments[:1], task.arguments[1:])
        assert (config.run.name, config.wandb.group) == (f"tune-{number}", "tune")
        assert (config.seed, config.schedule.name, config.train.epochs) == (3, "cosine", 1)
        found.append((config.optim.lr, config.model.args["hidden"]))
    assert found == [(lr, hidden) for lr in (0.1, 1e-5) for hidden in ([16], [16, 8], [])]


def test_each_line_of_a_task_is_one_argument(
    cli: Callable[..., Finished], write: Callable[[Any], Path]
) -> None:
    file = write({**GRID, "name": "my sweep"})
    result = cli("sweep", file, "--task", 4)
    assert (result.rc, result.err) == (0, ""), result
    assert result.out.splitlines() == [
        "recipe.yaml", "seed=3", "run.name=my sweep-4", "optim.lr=1e-05", "model.args.hidden=[16, 8]",
        "schedule.name=cosine", "wandb.group=my sweep",
    ]  # fmt: skip


def test_the_seeds_of_a_setting_are_one_kind_of_run(write: Callable[[Any], Path]) -> None:
    parameters = {
        "seed": {"values": [1, 2]},
        "optim.lr": {"values": [0.1, 0.2]},
        "model.args.hidden": {"value": [8, 8]},
    }
    tasks = expand(write({"method": "grid", "parameters": parameters}))
    kinds = [(load([], [*task.arguments, "train.epochs=1"]).wandb.job_type, task.number) for task in tasks]
    slow, fast = (f"optim.lr={rate} model.args.hidden=[8, 8]" for rate in (0.1, 0.2))
    assert kinds == [(slow, 0), (fast, 1), (slow, 2), (fast, 3)]


def test_the_list_and_the_count_tell_all_tasks(
    cli: Callable[..., Finished], write: Callable[[Any], Path]
) -> None:
    file = write({**GRID, "run_cap": 4})
    listed = cli("sweep", file, "--list")
    assert listed.rc == 0, listed
    lines = listed.out.splitlines()
    assert [line.split()[0] for line in lines] == ["0", "1", "2", "3"]
    assert lines[3] == "   3  optim.lr=1e-05 model.args.hidden=[16] schedule.name=cosine"
    assert cli("sweep", file).out == listed.out
    assert cli("sweep", file, "--count").out == "4\n"


@pytest.mark.parametrize(
    "value", ["cosine", "1", "true", "null", "1e-4", "a: b", "[x", "'quoted'", "", " x", "é\n", None, True, 3,
              1e-05, -2.5, [1, "2"], {"size": [2, 3]}],
)  # fmt: skip
def test_a_value_is_read_back_as_it_was(value: Any) -> None:
    config = load([], ["train.epochs=1", f"model.args.x={text(value)}"])
    assert config.model.args["x"] == value
    assert type(config.model.args["x"]) is type(value)
    if isinstance(value, str):
        assert load([], ["train.epochs=1", f"wandb.notes={text(value)}"]).wandb.notes == value


def test_a_sample_is_a_function_of_seed_and_number(write: Callable[[Any], Path]) -> None:
    tasks = expand(write(RANDOM))
    assert [task.overrides for task in expand(Path("tune.yaml"))] == [task.overrides for task in tasks]
    assert len({task.overrides for task in tasks}) == 5
    more = {**RANDOM["parameters"], "seed": {"min": 0, "max": 10**6}}  # type: ignore[dict-item]
    larger = expand(write({**RANDOM, "run_cap": 50, "parameters": more}))
    assert [task.overrides[:2] for task in larger[:5]] == [task.overrides for task in tasks]
    other = expand(write(RANDOM), ["seed=4"])
    assert not {task.overrides for task in other} & {task.overrides for task in tasks}
    for task in larger[::5]:
        config = load(task.arguments[:1], task.arguments[1:])
        assert 0.001 <= config.optim.lr <= 1.0
        assert 8 <= config.train.batch_size <= 64


@pytest.mark.parametrize(
    ("spec", "median"),
    [
        ({"distribution": "uniform", "min": 2.0, "max": 4.0}, 3.0),
        ({"distribution": "int_uniform", "min": 1, "max": 3}, 2),
        ({"distribution": "log_uniform", "min": 0, "max": 4}, math.exp(2)),
        ({"distribution": "log_uniform_values", "min": 0.01, "max": 1.0}, 0.1),
        ({"distribution": "inv_log_uniform", "min": 0, "max": 4}, math.exp(-2)),
        ({"distribution": "inv_log_uniform_values", "min": 0.01, "max": 1.0}, 0.1),
        ({"distribution": "normal", "mu": 5.0, "sigma": 0.5}, 5.0),
        ({"distribution": "log_normal", "mu": 1.0, "sigma": 0.1}, math.e),
        ({"distribution": "beta", "a": 3.0, "b": 3.0}, 0.5),
        ({"distribution": "q_uniform", "min": 0, "max": 100, "q": 10}, 50),
        ({"distribution": "q_normal", "mu": 5.0, "sigma": 1.0, "q": 0.1}, 5.0),
        ({"distribution": "categorical_w_probabilities", "values": [1, 9], "probabilities": [0.2, 0.8]}, 9),
    ],
)
def test_each_distribution_of_the_format_is_drawn_as_told(spec: dict[str, Any], median: float) -> None:
    source = Random(0)
    values = [draw(spec, source) for _ in range(4000)]
    assert statistics.median(values) == pytest.approx(median, rel=0.1)
    assert len(set(values)) > 1
    if "q" in spec:
        assert all(value == pytest.approx(round(value / spec["q"]) * spec["q"]) for value in values)
        assert isinstance(values[0], type(spec["q"]))
    if spec["distribution"] in ("uniform", "int_uniform", "log_uniform_values", "inv_log_uniform_values"):
        assert all(spec["min"] <= value <= spec["max"] for value in values)
    if spec["distribution"].startswith("categorical"):
        assert values.count(9) == pytest.approx(3200, rel=0.05)


def parameter(**spec: Any) -> dict[str, Any]:
    """A random sweep of one learning rate."""
    return {**RANDOM, "parameters": {"optim.lr": spec}}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("a: [", "tune.yaml: not valid YAML"),
        ("- a", "holds a list or text"),
        ({**GRID, "metod": 1}, "no key 'metod' (did you mean 'method'?)"),
        ({**GRID, "method": "bayes"}, "'method' must be grid or random, not 'bayes'"),
        ({**GRID, "run_cap": 0}, "'run_cap' must be a whole number of at least 1, not 0"),
        ({**GRID, "parameters": {}}, "'parameters' must hold what is varied"),
        ({**GRID, "parameters": {"optim.lr": 0.1}}, "'optim.lr' must be like {values: [0.1, 0.2]}, not 0.1"),
        ({**GRID, "parameters": {"optim.lr": {"min": 0.1, "max": 0.2}}}, "endless values as uniform"),
        ({**GRID, "command": ["dist-train", "train", "${args}"]}, "'command' must be like [dist-train,"),
        ({**RANDOM, "run_cap": None}, "'run_cap' is missing"),
        ({**RANDOM, "command": ["train", "none.yaml", "${args_no_hyphens}"]}, "none.yaml: no such config"),
        (parameter(min=1, max=0.5), "needs value, values, or min and max; both as whole numbers"),
        (parameter(distribution="unifrm"), "unknown distribution 'unifrm' (did you mean 'uniform'?)"),
        (parameter(distribution="uniform", min=0.1), "needs 'max' as uniform"),
        (parameter(min=0.1, max=0.2, q=1), "can't have 'q' as uniform"),
        ("method: random\nrun_cap: 2\nparameters: {optim.lr: {distribution: uniform, min: 1e-4, max: 0.1}}",
         "takes 1e-4 for text, 1.0e-4 for a number"),
        (parameter(min=0.3, max=0.2), "can't lie between 0.3 and 0.2"),
        (parameter(distribution="log_uniform_values", min=0, max=1), "can't lie between 0 and 1"),
        (parameter(values=[1, 2], probabilities=[1]), "one of 'probabilities' for each of 'values'"),
        (parameter(values=[]), "needs a list as 'values'"),
        (parameter(distribution="q_uniform", min=0, max=1, q=0), "needs a 'q' above 0"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_file_is_one_sentence(content: Any, told: str, write: Callable[[Any], Path]) -> None:
    with pytest.raises(UserError) as error:
        expand(write(content))
    assert told in str(error.value)
    assert str(error.value).startswith("tune.yaml: ")
    assert "\n" not in str(error.value)


def test_what_the_configuration_refuses_is_told_with_the_task(
    cli: Callable[..., Finished], write: Callable[[Any], Path]
) -> None:
    file = write({**GRID, "parameters": {"optim.lrr": {"values": [1, 2]}}})
    for words in (["--list"], ["--count"], ["--task", 1]):
        result = cli("sweep", file, *words)
        assert (result.rc, result.err.count("\n"), result.out) == (2, 1, ""), result
        assert "tune.yaml: task " in result.err
        assert "'optim.lrr' (did you mean 'optim.lr'?)" in result.err
    half = write({**GRID, "parameters": {"train.accumulate": {"values": [1, 0]}}})
    assert pick(expand(half), 0).number == 0
    with pytest.raises(UserError, match=r"task 1: .*train\.accumulate"):
        pick(expand(half), 1)
    with pytest.raises(UserError, match="there is no task 2; they are numbered 0 to 1"):
        pick(expand(half), 2)


TWO = "dist-train: sweep: give one of --list, --task, --count, --train and --results.\n"


def test_two_questions_at_once_are_refused(
    cli: Callable[..., Finished], write: Callable[[Any], Path]
) -> None:
    result = cli("sweep", write(GRID), "--count", "--task", 0)
    assert (result.rc, result.err) == (2, TWO)
    missing = cli("sweep", "nowhere.yaml")
    assert (missing.rc, missing.err.count("\n")) == (2, 1), missing
    assert "nowhere.yaml: the sweep file can't be read" in missing.err


@pytest.mark.long
@pytest.mark.parametrize("file", sorted((REPO / "configs/sweeps").glob("*.yaml")), ids=lambda file: file.name)
def test_an_agent_of_wandb_trains_what_our_tasks_train(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb's own code reads the file and makes the agent's command of it."""
    from wandb.sdk.launch.sweeps import utils as agent

    monkeypatch.chdir(REPO)
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    content = agent.load_sweep_config(str(file))
    assert content is not None
    for task in expand(file):
        task.check()
        flat = dict(word.split("=", 1) for word in task.overrides)
        args = {"args": {name: {"value": yaml.safe_load(value)} for name, value in flat.items()}}
        filled = agent.create_sweep_command_args(args)["args_no_hyphens"]
        words: list[str] = []
        for word in agent.create_sweep_command(content["command"]):
            words += filled if word == "${args_no_hyphens}" else [word]
        assert words[:2] == ["dist-train", "train"]
        theirs = load([w for w in words[2:] if "=" not in w], [w for w in words[2:] if "=" in w])
        ours = load([w for w in task.arguments if "=" not in w], [w for w in task.arguments if "=" in w])
        assert theirs.run.name == f"{file.stem}-abc123"
        theirs.run.name, theirs.wandb.group = ours.run.name, ours.wandb.group
        assert theirs == ours


def test_several_seeds_are_trained_named_and_grouped_by_a_short_command_and_their_spread_is_told(
    cli: Callable[..., Finished], small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text("seed: 4\n")
    tasks = of_seeds(["recipe.yaml", *small], 3)
    configs = [load(task.arguments[:1], task.arguments[1:]) for task in tasks]
    assert [config.seed for config in configs] == [4, 5, 6] == [task.number for task in tasks]
    assert [config.run.name for config in configs] == [f"recipe-seed-{seed}" for seed in (4, 5, 6)]
    assert {config.wandb.group for config in configs} == {"recipe-seed"}
    assert list(results(tasks))[1] == "recipe-seed-5  seed=5  not begun"
    for files, told in ((["recipe.yaml"], "recipe.yaml"), ([], "--seeds")):  # not an override, given first
        with pytest.raises(UserError, match=f"^{told}: there is no task 9; they are numbered 0 to 2"):
            pick(of_seeds([*small, "run.name=x", *files], 3), 9)
    words = ["sweep", "recipe.yaml", *small, "--seeds", 3]
    assert cli(*words, "--task", 2).out.splitlines() == tasks[2].arguments
    first = cli(
        "sweep", "data.download_dir=a//b", *words[1:], "--task", 0
    ).out  # not a path, though it comes first
    assert "data.download_dir=a//b" in first.splitlines()
    trained = cli(*words, "--train")
    assert trained.rc == 0, trained
    *lines, spread = list(results(tasks))
    assert trained.out.splitlines()[-4:] == [*lines, spread]
    assert all(line.startswith(f"{config.run.name}  seed={config.seed}  completed  eval/loss")
               for line, config in zip(lines, configs, strict=True))  # fmt: skip
    losses = [read_status(config.run_dir)["metrics"]["eval/loss"] for config in configs]
    assert len(set(losses)) == 3
    mean, deviation = statistics.mean(losses), statistics.stdev(losses)
    told = f"mean ± standard deviation of 3 runs: eval/loss {mean:.4g} ± {deviation:.2g}  eval/accuracy"
    assert spread.startswith(told)


@pytest.mark.long
def test_seeds_that_are_interrupted_go_on_by_the_same_command_also_on_two_ranks(
    ranks: Callable[..., list[Finished]], small: list[str], tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text("seed: 0\n")
    (tmp_path / "mine.py").write_text(
        "import os, signal\n"
        "def halting(t):\n"
        "    is_second = os.path.exists('runs/recipe-seed-1/metrics.jsonl')\n"
        "    if os.environ['RANK'] == '0' and t > 0.5 and is_second and not os.path.exists('been'):\n"
        "        open('been', 'w').close()\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return 1.0\n"
    )
    words = ["sweep", "recipe.yaml", *small, "schedule.name=mine:halting", "--seeds", 2, "--train"]
    stopped = ranks(2, *words)
    assert [rank.rc for rank in stopped] == [75, 75], stopped
    assert read_status(tmp_path / "runs/recipe-seed-0")["state"] == "completed"
    assert read_status(tmp_path / "runs/recipe-seed-1")["state"] == "interrupted"
    done = ranks(2, *words)
    assert [rank.rc for rank in done] == [0, 0], done
    assert "mean ± standard deviation of 2 runs" in done[0].out and done[1].out == ""
    assert done[0].out.count("The run is complete") == 1
