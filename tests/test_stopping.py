"""What evaluations mean for the rest of a run: rules by which it is complete early, and plateaus."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_train.config import StopWhen, UserError, from_mapping
from dist_train.record.history import read_attempts, read_metrics, read_status
from dist_train.tools.replay import replay
from dist_train.tools.status import collect
from tests.distributed.ranks import equal, last, same_bits
from tests.processes import Finished

# No loss is better by 10 than the first one.
NEVER_BETTER = "train.stop_when=eval/loss not better by 10 for 2 evaluations"


@pytest.mark.parametrize(
    ("text", "values", "why"),
    [
        ("eval/loss not better for 2 evaluations", [3, 2, 2, 1], ""),
        ("eval/loss not better for 2 evaluations", [3, 2, 2, 2], "was not better than 2 for 2 evaluations"),
        ("eval/loss not better for 1 evaluation", [3, math.nan], "was not better than 3 for 1 evaluation"),
        ("eval/loss not better for 1 evaluation", [math.nan, 3], ""),
        ("eval/loss not better by 0.5 for 2 evaluations", [3, 2.6, 2.4], ""),
        ("eval/loss not better by 0.5 for 2 evaluations", [3, 2.6, 2.5], "than 3 by 0.5 for 2 evaluations"),
        ("max eval/loss not better for 2 evaluations", [3, 2, 1], "was not better than 3 for 2 evaluations"),
        ("eval/accuracy not better for 2 evaluations", [0.1, 0.2, 0.3], ""),
        ("eval/accuracy not better for 2 evaluations", [0.3, 0.2, 0.1], "not better than 0.3"),
        ("eval/accuracy above 0.25", [0.3, 0.2], ""),
        ("eval/accuracy above 0.25", [0.2, 0.3], "eval/accuracy 0.3 is above 0.25"),
        ("eval/loss below 1e-2, eval/accuracy above 0.25", [0.001], "eval/loss 0.001 is below 0.01"),
        ("eval/accuracy above 0.25,  eval/loss  below 1", [0.5], "eval/accuracy 0.5 is above 0.25"),
        ("", [1, 1, 1], ""),
    ],
)
def test_a_rule_is_a_function_of_the_values_so_far(text: str, values: list[float], why: str) -> None:
    history = {"eval/loss": values, "eval/accuracy": values}
    rules = StopWhen.parse(text, "max eval/accuracy")
    assert all(not rule.reached({}) for rule in rules)
    found = [reason for rule in rules if (reason := rule.reached(history))]
    assert why in "".join(found[:1]) and bool(found) == bool(why)


@pytest.mark.parametrize(
    "text",
    ["loss not better for 2 evaluations", "eval/loss not better", "eval/loss not better for 0 evaluations",
     "eval/loss not better for 2 epochs", "eval/loss above much", "eval/loss below 1 and more"],
)  # fmt: skip
def test_what_is_no_rule_is_told_with_the_grammar(text: str) -> None:
    with pytest.raises(UserError, match=r"'train\.stop_when' is written as `eval/loss not better for 5 eval"):
        from_mapping({"train": {"steps": 1, "stop_when": text}})


@pytest.mark.parametrize(
    "section", [{"train": {"steps": 1, "stop_when": "eval/loss below 1"}}, {"schedule": {"name": "plateau"}}]
)
def test_what_waits_for_evaluations_needs_some(section: dict[str, Any]) -> None:
    with pytest.raises(
        UserError, match=r"'eval\.every' is never: train\.stop_when and schedule\.name=plateau"
    ):
        from_mapping({"train": {"steps": 1}, **section, "eval": {"every": "never"}})


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train.stop_when=eval/acuracy above 1"], "train.stop_when: the evaluation has no 'eval/acuracy'"),
        (["train.stop_when=eval/accuracy not better for 2 evaluations", "checkpoint.best=min eval/loss"],
         "train.stop_when: must tell what is better, as `min eval/accuracy not better"),
        (["schedule.name=plateau", "schedule.args.metric=max eval/top5"],
         "schedule.args.metric: the evaluation has no 'eval/top5'"),
    ],
)  # fmt: skip
def test_a_metric_that_is_not_there_is_told_before_the_first_step(
    words: list[str], told: str, here: Callable[..., Any], small: list[str], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=told):
        here(*small, *words)
    assert not (tmp_path / "runs").exists()


@pytest.mark.long
def test_a_run_that_is_stopped_by_its_rule_is_complete_says_why_and_goes_on_with_another_rule(
    here: Callable[..., Any],
    cli: Callable[..., Finished],
    small: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [*small, "train.steps=40", "eval.every=3", "train.ema=0.9"]
    why = r"eval/loss was not better than 0\.\d+ by 10 for 2 evaluations"
    finished = cli("train", *words, NEVER_BETTER)
    assert finished.rc == 0
    assert_matches(rf"completed at step 9: runs/run: {why}\n", finished.out)
    run = tmp_path / "runs/run"
    row = read_metrics(run)[-1]
    assert (row["kind"], row["step"]) == ("eval", 9)
    assert_matches(why, row["stopped"])
    assert last(tmp_path)["step"] == 9 and (run / "model.safetensors").exists()
    assert read_status(run)["reason"] == row["stopped"] == collect([run])[0]["reason"]
    again = here(*words, NEVER_BETTER)
    assert (again.state, again.step, again.stopped) == ("completed", 9, row["stopped"])
    assert "The run is complete: runs/run (step 9 of 40: eval/loss was" in capsys.readouterr().out
    assert len(read_attempts(run)) == 1
    longer = here(*words, NEVER_BETTER.replace("for 2", "for 4"))
    assert (longer.step, len(read_attempts(run))) == (15, 2)
    whole = here(*words)
    assert (whole.step, whole.stopped) == (40, "")
    here(*words, "run.name=straight")
    assert same_bits(last(tmp_path), last(tmp_path, "straight"))
    assert equal(last(tmp_path)["history"], last(tmp_path, "straight")["history"])


def test_another_run_that_its_rule_ends_at_once_is_told(
    here: Callable[..., Any], small: list[str], tmp_path: Path
) -> None:
    words = [*small, "train.steps=9", "eval.every=3", "train.stop_when=eval/loss above 0"]
    here(*words)
    with pytest.raises(UserError, match=r"resume: .*which train.stop_when ends there \(eval/loss"):
        here(*words, "run.name=other", "resume=runs/run")
    assert not (tmp_path / "runs/other").exists()


def assert_matches(pattern: str, text: str) -> None:
    """That the text holds the pattern."""
    assert re.search(pattern, text), text


def test_a_run_killed_where_its_rule_ends_it_is_completed_by_the_same_command(
    here: Callable[..., Any], small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dist_train.trainer import Trainer

    words = [*small, "train.steps=40", "eval.every=3", NEVER_BETTER]
    monkeypatch.setattr(Trainer, "export", lambda trainer: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        here(*words)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    again = here(*words)
    assert (again.state, again.step) == ("completed", 9)
    assert (tmp_path / "runs/run/model.safetensors").exists()


def test_a_plateau_lowers_the_rate_and_a_run_goes_on_and_is_replayed_exactly(
    here: Callable[..., Any], small: list[str], tmp_path: Path
) -> None:
    args = "schedule.args={factor: 0.5, patience: 0, by: 10, final: 0.2}"
    words = [*small, "schedule.name=plateau", args, "schedule.warmup=2", "eval.every=3", "log.every=1"]
    here(*words, "run.name=whole")
    rates = [row["lr"] for row in read_metrics(tmp_path / "runs/whole") if "lr" in row]
    assert rates == pytest.approx([0.05, 0.1, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05, 0.05, 0.025, 0.025, 0.025])
    here(*words, "checkpoint.every=5", "checkpoint.best=none")
    (tmp_path / "runs/run/checkpoints/step-00000012.pt").unlink()
    here(*words, "checkpoint.every=5", "checkpoint.best=none")
    assert read_attempts(tmp_path / "runs/run")[-1]["step"] == 10
    assert same_bits(last(tmp_path), last(tmp_path, "whole"))
    for path in (tmp_path / "runs/run/checkpoints").glob("step-*"):
        path.unlink()
    losses = [row["train/loss"] for row in read_metrics(tmp_path / "runs/run") if "train/loss" in row]
    assert replay(tmp_path / "runs/run", 12).loss == losses[-1]


def test_a_state_of_before_there_was_a_history_still_loads(
    here: Callable[..., Any], small: list[str], tmp_path: Path
) -> None:
    here(*small)
    path = tmp_path / "runs/run/checkpoints/step-00000012.pt"
    saved = torch.load(path, weights_only=True)
    del saved["history"]
    for key in ("groups", "no_decay", "layer_decay"):
        del saved["config"]["optim"][key]
    torch.save(saved, path)
    assert here(*small, "train.steps=14").step == 14
    assert len(last(tmp_path)["history"]["eval/loss"]) == 1
