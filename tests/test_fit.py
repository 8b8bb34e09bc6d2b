"""Training from its start to its end: interrupted, failed, begun from another run, shown on a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_train import fit, load
from dist_train.config import UserError
from dist_train.record.history import read_metrics, read_status
from tests.distributed.ranks import same_bits
from tests.processes import Finished, environment
from tests.warm import Process
from tests.worlds import SMALL, pictures


def last(tmp_path: Path, name: str = "run") -> dict[str, Any]:
    path = tmp_path / "runs" / name / "checkpoints" / "last.pt"
    return dict(torch.load(path, weights_only=True))


def steps_logged(run: Path) -> list[int]:
    """The steps in metrics.jsonl while it is written."""
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line)["step"] for line in lines]


# --- interruption ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_run_interrupted_in_mid_epoch_says_try_again_and_then_completes(
    name: str,
    begin: Callable[..., Process],
    here: Callable[..., Any],
    wait_for: Callable[..., None],
    tmp_path: Path,
) -> None:
    x, y = pictures(200_000)
    np.savez(tmp_path / "many.npz", x_train=x, y_train=y, x_test=x[:99], y_test=y[:99])
    long = [*SMALL, "data.root=many.npz", "train.batch_size=2", "model.args.hidden=[8]",
            "model.args.dropout=0.5", "log.every=50", "checkpoint.every=never"]  # fmt: skip
    process = begin("train", *long, "train.steps=100000")
    run = tmp_path / "runs" / "run"
    wait_for(lambda: steps_logged(run)[-1:] >= [100], process)
    assert read_status(run)["state"] == "running"
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "Traceback" not in err
    status = read_status(run)
    step = status["step"]
    assert (status["state"], status["attempts"], status["total_steps"]) == ("interrupted", 1, 100_000)
    assert name in status["reason"]
    assert 100 <= step < 100_000
    assert f"interrupted at step {step:,}: runs/run; the same command goes on with it" in out
    assert last(tmp_path)["step"] == step

    total = f"train.steps={step + 123}"
    again = here(*long, total)
    assert (again.state, again.step) == ("completed", step + 123)
    assert f"(step {step:,})" in (run / "log.txt").read_text()
    expected = {"state": "completed", "step": step + 123, "total_steps": step + 123, "attempts": 2,
                "reason": "", "lost_steps": 0}  # fmt: skip
    assert expected.items() <= read_status(run).items()
    here(*long, total, "run.name=straight")
    assert same_bits(last(tmp_path), last(tmp_path, "straight"))
    rows = [
        {key: row[key] for key in ("step", "train/loss") if key in row}
        for row in read_metrics(run)
        if row["step"] % 50 == 0
    ]
    assert [row["step"] for row in rows] == list(range(50, step + 123, 50))
    assert rows == [
        {key: row[key] for key in ("step", "train/loss")}
        for row in read_metrics(tmp_path / "runs" / "straight")
        if row["step"] % 50 == 0
    ]


def test_a_second_ctrl_c_stops_at_once(
    begin: Callable[..., Process], wait_for: Callable[..., None], npz: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(
        "import pathlib, time\n"
        "def slow(image):\n    pathlib.Path('reading').touch()\n    time.sleep(600)\n    return image\n"
    )
    process = begin("train", *SMALL, "data.train_transform=[mine:slow]")
    wait_for((tmp_path / "reading").exists, process)
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)  # it waits for the end of the step
    process.send_signal(signal.SIGINT)
    process.wait(30)
    assert process.returncode == 130


# --- failure -----------------------------------------------------------------------------------------

FAILS_ONCE = """
import pathlib
from dist_train.tasks import Classification

class FailsOnce(Classification):
    steps = 0
    def loss(self, outputs, targets):
        type(self).steps += len(targets) == 16  # not the trial before the first step
        mark = pathlib.Path("failed")
        if self.steps == 8 and not mark.exists():
            mark.touch()
            raise ArithmeticError("too much")
        return super().loss(outputs, targets)
"""


def test_a_run_that_failed_says_why_and_goes_on_at_the_next_start(
    cli: Callable[..., Finished], here: Callable[..., Any], npz: Path, tmp_path: Path
) -> None:
    (tmp_path / "my_failure.py").write_text(FAILS_ONCE)
    words = ["task.name=my_failure:FailsOnce", "checkpoint.every=5", "eval.every=never", "data.workers=2"]
    failed = cli("train", *SMALL, *words)
    assert failed.rc == 1, failed
    assert "ArithmeticError: too much" in failed.err
    run = tmp_path / "runs" / "run"
    status = read_status(run)
    assert (status["state"], status["reason"]) == ("failed", "ArithmeticError: too much")
    again = cli("train", *SMALL, *words)
    assert again.rc == 0, again
    assert "(step 5)" in again.err
    assert (read_status(run)["state"], read_status(run)["attempts"]) == ("completed", 2)
    here(*SMALL, *words, "run.name=straight")
    assert same_bits(last(tmp_path), last(tmp_path, "straight"))


# --- beginning and going on --------------------------------------------------------------------------


def test_a_run_begins_from_the_checkpoint_of_another(
    here: Callable[..., Any], small: list[str], tmp_path: Path
) -> None:
    here(*small, "run.name=first")
    source = tmp_path / "runs" / "first"
    before = (source / "metrics.jsonl").read_bytes()
    result = here(*small, "run.name=second", f"resume={source}", "optim.lr=0.01", "train.steps=20")
    assert (result.state, result.step) == ("completed", 20)
    log = (tmp_path / "runs/second/log.txt").read_text()
    assert "going on from" in log and "changed: optim.lr: 0.1 -> 0.01" in log
    rows = read_metrics(tmp_path / "runs" / "second")
    assert {row["lr"] for row in rows if "lr" in row} == {0.01}
    assert (source / "metrics.jsonl").read_bytes() == before


def test_a_model_that_does_not_fit_the_checkpoint_is_told(
    here: Callable[..., Any], small: list[str], tmp_path: Path
) -> None:
    here(*small, "run.name=first")
    with pytest.raises(UserError, match="does not fit the model"):
        here(*small, "run.name=second", "resume=runs/first", "model.args.hidden=[5]")
    assert not (tmp_path / "runs" / "second").exists()


def test_a_run_without_evaluations_has_one_at_its_end(
    here: Callable[..., Any], small: list[str], tmp_path: Path
) -> None:
    result = here(*small, "eval.every=never", "checkpoint.every=never")
    assert set(result.metrics) == {"eval/loss", "eval/accuracy"}
    rows = [row for row in read_metrics(tmp_path / "runs" / "run") if "eval/loss" in row]
    assert [row["step"] for row in rows] == [12]


def test_a_run_of_epochs_has_as_many_steps_as_these(here: Callable[..., Any], small: list[str]) -> None:
    epochs = [*small, "train.steps=null", "train.epochs=3", "train.batch_size=20"]
    assert here(*epochs).step == 3 * 5
    assert here(*epochs, "data.drop_last=true", "run.name=dropping").step == 3 * 4


# --- from Python -------------------------------------------------------------------------------------


def test_fit_takes_a_file_a_mapping_or_a_configuration(npz: Path, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("\n".join([
        f"run: {{dir: {tmp_path}}}", f"data: {{name: arrays, root: {npz}}}", "train: {steps: 3}",
        "wandb: {mode: disabled}", "device: cpu",
    ]))  # fmt: skip
    file = tmp_path / "job.yaml"
    mapping = {
        "run": {"dir": str(tmp_path), "name": "mapping"},
        "data": {"name": "arrays", "root": str(npz)},
        "train": {"steps": 3},
        "wandb": {"mode": "disabled"},
        "device": "cpu",
    }
    configs = [file, str(file), mapping, load([file], ["run.name=config"])]
    results = [fit(config) for config in configs]  # type: ignore[arg-type]
    assert [result.folder.name for result in results] == ["job", "job", "mapping", "config"]
    assert all((result.state, result.step) == ("completed", 3) for result in results)
    assert len({result.metrics["eval/loss"] for result in results}) == 1


def test_fit_leaves_signal_handlers_and_the_processes_as_they_were(
    here: Callable[..., Any], small: list[str]
) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    here(*small)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before
    assert not torch.distributed.is_initialized()


# --- what is shown -----------------------------------------------------------------------------------


def test_without_a_terminal_there_are_plain_lines(cli: Callable[..., Finished], small: list[str]) -> None:
    result = cli("train", *small)
    assert result.rc == 0, result
    lines = result.err.splitlines()
    assert lines[:2] == [
        "run runs/run: mlp on arrays, 90 training and 37 eval samples",
        "12 steps of 16, 1 process on cpu, 1 CPU thread",
    ]
    assert [line.split()[1] for line in lines[2:]] == ["4/12", "6/12", "8/12", "12/12", "12/12"]
    assert "\x1b" not in result.err
    place, metrics = result.out.splitlines()  # the result stands last
    assert place == "completed at step 12: runs/run"
    assert re.fullmatch(r"eval/loss \S+  eval/accuracy (\S+)  best eval/accuracy \1", metrics), metrics
    again = cli("train", *small, "train.steps=20")
    assert "goodput" in again.err.splitlines()[-1] and "in 2 attempts" in again.err  # now it has a meaning


@pytest.mark.long
def test_on_a_terminal_there_is_a_bar_that_counts_to_the_end(npz: Path, tmp_path: Path) -> None:
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "dist_train", "train", *SMALL, "log.every=12", "eval.every=12"],
        cwd=tmp_path,
        env=environment(TERM="xterm-256color"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=slave,
    )
    os.close(slave)
    shown = b""
    try:
        while chunk := os.read(master, 4096):
            shown += chunk
    except OSError:  # the other end is closed
        pass
    os.close(master)
    assert process.wait(60) == 0, shown
    text = shown.decode()
    assert {f"{step}/12" for step in range(1, 13)} & set(re.findall(r"\b\d+/12\b", text)) >= {"1/12", "12/12"}
    assert "eval/accuracy" in text and "\x1b[" in text
    assert text.count("run runs/run: mlp on arrays") == 1


FAILS = """
import gc
import dist_train
from torch.nn.parallel import DistributedDataParallel

try:
    dist_train.fit(dist_train.load([], WORDS))
except dist_train.UserError as error:
    print(error, [type(item) for item in gc.get_objects() if type(item) is DistributedDataParallel])
"""


def test_a_mistake_that_is_found_late_leaves_no_threads_that_would_abort_the_end_of_python(
    small: list[str], tmp_path: Path, ranks: Callable[..., list[Finished]]
) -> None:
    (tmp_path / "fails.py").write_text(FAILS.replace("WORDS", repr([*small, "run.dir=fails.py"])))
    for rank in ranks(2, "fails.py"):
        assert rank.rc == 0 and "can't be written: Not a directory. []" in rank.out, rank


def test_each_row_is_handed_to_a_function_of_ones_own_which_may_stop_the_run(
    here: Callable[..., Any], small: list[str], tmp_path: Path
) -> None:
    from dist_train.record.history import read_metrics

    seen: list[dict[str, Any]] = []

    def on_row(row: dict[str, Any]) -> bool:
        seen.append(row)
        return not (row["kind"] == "eval" and row["step"] >= 6)

    words = [*small, "eval.every=3", "log.every=2"]
    result = here(*words, on_row=on_row)
    assert (result.state, tmp_path / result.folder) == ("interrupted", tmp_path / "runs/run")
    assert 6 <= result.step < 12
    assert seen == read_metrics(tmp_path / "runs" / "run")
    assert {row["kind"] for row in seen} == {"train", "eval"}
    assert here(*words, on_row=lambda row: None).state == "completed"  # nothing returned asks for nothing
