"""`dist-train watch`: what it shows is what the run's files hold, and it ends when it is told to."""

from __future__ import annotations

import io
import json
import os
import pty
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from rich.console import Console

from dist_train.guard import pace
from dist_train.record.history import Followed, effective, read_metrics, read_status
from dist_train.record.terminal import sparkline
from dist_train.tools.seen import KEPT, look, statuses
from dist_train.tools.watch import COLUMNS, View
from tests.processes import REPO, Finished, environment
from tests.test_status import HOST, RUNNING, write_run


def troubles(folder: Path) -> list[str]:
    """What is told of one run."""
    (status,) = statuses([folder])
    return look(status, Followed(folder, KEPT)).troubles


SLOW = """
import math, os, time
from torch import nn
from dist_train.guard import pace, watchdog

pace.READ_SECONDS, watchdog.LOOK_SECONDS = 0.4, 0.4  # all of it sooner

def wait(seconds):
    time.sleep(seconds if os.environ.get("RANK", "1") == "1" else 0)

def transform(image):
    wait(0.01)
    return image

class Net(nn.Module):
    def __init__(self, input_shape, num_classes):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(input_shape), num_classes))

    def forward(self, images):
        wait(0.08)
        return self.layers(images)
"""


def test_a_run_is_shown_as_it_goes_when_it_is_killed_and_when_it_has_gone_on(
    begin: Callable[..., Any],
    cli: Callable[..., Finished],
    under_way: Callable[..., Any],
    small: list[str],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "runs/run"
    (tmp_path / "mine.py").write_text(SLOW)
    run, words = Path("runs/run"), [*small, "log.every=2", "eval.every=4", "checkpoint.every=6"]
    words.append("data.train_transform=[mine:transform]")  # which leaves the CPU to others
    process = under_way(
        begin("train", *words, "train.steps=100000"), until=lambda run: read_status(run).get("metrics")
    )
    shown = cli("watch", "--once")
    assert (shown.rc, shown.err) == (0, ""), shown
    lines = shown.out.splitlines()
    assert lines[0].split()[:2] == [str(run), "running"] and HOST in lines[0]
    assert "/100,000" in lines[1] and "░" in lines[1]
    assert " left  " in lines[2] and " samples/s" in lines[2] and "trouble" not in shown.out
    for name in ("train/loss", "lr", "eval/loss", "eval/accuracy"):
        assert any(line.split()[0] == name for line in lines), shown.out
    process.kill()
    process.wait()
    shown = cli("watch", "runs")  # no terminal: one picture, without --once
    assert "lost" in shown.out.splitlines()[0] and f"process {process.pid} on {HOST} is gone" in shown.out
    step = read_status(folder).get("step", 0)
    assert cli("train", *words, f"train.steps={step + 8}").rc == 0
    shown = cli("watch", "--once")
    status, rows = read_status(folder), read_metrics(folder)
    assert "completed" in shown.out.splitlines()[0] and f"{step + 8:,}/{step + 8:,}" in shown.out
    assert f"attempt 2, {status['lost_steps']:,} step" in shown.out
    last = next(line.split() for line in shown.out.splitlines() if line.startswith("train/loss"))
    losses = [row["train/loss"] for row in rows if row["kind"] == "train"]
    assert last[-1] == f"{losses[-1]:.4g}" and len(last[1]) == 60


@pytest.mark.parametrize("slow", ["data", "model"])
def test_the_slowest_rank_is_named_with_what_it_is_slow_at(
    begin_ranks: Callable[..., Any],
    cli: Callable[..., Finished],
    wait_for: Callable[..., None],
    small: list[str],
    tmp_path: Path,
    slow: str,
) -> None:
    (tmp_path / "mine.py").write_text(SLOW)
    word = {"data": "data.train_transform=[mine:transform]", "model": "model.name=mine:Net"}[slow]
    ranks = begin_ranks(2, "train", *small, word, "train.steps=100000", env={"PYTHONPATH": REPO})
    file, found = tmp_path / "runs/run/ranks.json", {}

    def signalled(number: int) -> None:
        for rank in ranks:
            rank.send_signal(number)

    def told() -> bool:
        """Whether rank 1 is named, in a file not renewed meanwhile; under load, rank 0 may be."""
        if not file.exists():
            return False
        signalled(signal.SIGSTOP)
        found.update(json.loads(file.read_text()))
        if found.get("steps", 0) > 3 and found["slowest"]["rank"] == 1:
            return True
        signalled(signal.SIGCONT)
        found.clear()
        time.sleep(0.2)
        return False

    wait_for(told, ranks[0])
    shown = cli("watch", "--once")
    signalled(signal.SIGCONT)
    named = found["slowest"]
    assert (named["rank"], named["host"]) == (1, HOST)
    assert named["seconds"] > found["seconds"]  # the faster one's, as there are two
    assert (named["data"] > named["seconds"] / 2) == (slow == "data")
    assert f"slowest: rank 1 on {HOST}, " in shown.out


def test_what_may_be_wrong_with_a_run_is_told(tmp_path: Path) -> None:
    alive = {"host": HOST, "pid": os.getpid()}
    run = write_run(tmp_path / "a", alive, **{**RUNNING, **alive, "attempts": 1, "trouble": ""})
    assert troubles(run) == []
    os.utime(run / "status.json", (time.time() - 200,) * 2)
    assert troubles(run) == ["stalled: its process lives, but the loop has told nothing for 3m20s"]
    rows = [
        {"kind": "train", "step": step, "attempt": 1, "train/loss": loss}
        for step, loss in ((1, 2.0), (2, None))
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "status.json").write_text(
        json.dumps({**RUNNING, **alive, "skipped_steps": 2, "bad_samples": 1, "lost_steps": 30})
    )
    assert troubles(run) == [
        "train/loss is not finite at step 2",
        "2 steps skipped: not finite",
        "1 sample could not be read",
        "attempt 2, 30 steps done again",
        "two",
    ]
    told = {"steps": 9, "seconds": 0.01, "slowest": {"rank": 3, "host": "b", "seconds": 0.04, "data": 0.03}}
    (run / "ranks.json").write_text(json.dumps(told))
    slow = "slowest: rank 3 on b, 40 ms a step of its own, 30 of them for data; the median rank has 10"
    assert troubles(run)[-1] == slow
    (run / "ranks.json").write_text(json.dumps({**told, "seconds": 0.035}))
    assert troubles(run)[-1] == "two"  # not so slow that the others wait for it
    for damaged in ("[1]", '{"steps": 9, "slowest": {}}', "{"):
        (run / "ranks.json").write_text(damaged)
        assert troubles(run)[-1] == "two"
    preempted = {"state": "interrupted", "reason": "SIGTERM, as SLURM sends it", "step": 3, "total_steps": 9}
    assert troubles(write_run(tmp_path / "b", **preempted)) == ["interrupted: SIGTERM, as SLURM sends it"]
    failed = {**preempted, "state": "failed", "reason": "OSError: disk full"}
    assert troubles(write_run(tmp_path / "c", **failed)) == ["failed: OSError: disk full"]


def test_several_runs_are_a_table_with_those_that_need_somebody_first(
    cli: Callable[..., Finished], tmp_path: Path
) -> None:
    write_run(tmp_path / "runs/a", state="completed", step=9, total_steps=9)
    write_run(tmp_path / "runs/b", state="failed", step=3, total_steps=9, reason="OSError: disk full")
    alive = {"host": HOST, "pid": os.getpid()}
    write_run(tmp_path / "runs/c", alive, **{**RUNNING, **alive})
    _, _, *lines = [line for line in cli("watch").out.splitlines() if line.strip()]
    assert [line.split()[:2] for line in lines] == [
        ["runs/c", "running"], ["runs/b", "failed"], ["runs/a", "completed"],
    ]  # fmt: skip
    assert "1,200/4,690" in lines[0] and "███░░░░░░░" in lines[0] and "10,834" in lines[0]
    assert "OSError: disk full" in lines[1]
    result = cli("watch", "runs/nowhere")
    assert (result.rc, result.err) == (2, "dist-train: runs/nowhere: there is no such run.\n")
    plain = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="backslashreplace")
    console = Console(file=plain, width=160)
    console.print(View([tmp_path / "runs"], console).picture(height=None))
    plain.seek(0)
    assert "###......." in plain.read()


@pytest.mark.parametrize("width", [110, 130, 200])
def test_a_long_trouble_is_cut_and_takes_no_column_away(tmp_path: Path, width: int) -> None:
    write_run(tmp_path / "a", state="interrupted", step=12_300, total_steps=18_760, reason="SIGINT")
    write_run(
        tmp_path / "b", state="failed", step=3, total_steps=18_760, reason="its loss is not finite " * 9
    )
    shown = io.StringIO()
    console = Console(file=shown, width=width)
    console.print(View([tmp_path / "a", tmp_path / "b"], console).picture(height=None))
    headings, _, *lines = [line for line in shown.getvalue().splitlines() if line.strip()]
    assert len(headings.split()) == len(COLUMNS)
    assert all(len(line.rstrip()) <= width for line in lines)
    found = " ".join(lines)
    assert "failed: " in found and "3/18,760" in found
    assert "interrupted " in found or width == 110
    assert "12,300/18,760" in found or width < 200


@pytest.mark.parametrize("end", ["q", "SIGINT"])
def test_on_a_terminal_it_goes_on_until_it_is_told_to_end(tmp_path: Path, end: str) -> None:
    run = write_run(tmp_path / "runs/a", state="interrupted", step=3, total_steps=9, reason="SIGTERM")
    ours, theirs = pty.openpty()
    words = [sys.executable, "-m", "dist_train", "watch", "--every", "0.1"]
    told = {**environment(TERM="xterm", COLUMNS=90, LINES=20), "PYTHONPATH": str(REPO)}
    process = subprocess.Popen(words, cwd=tmp_path, stdin=theirs, stdout=theirs, stderr=theirs, env=told)
    os.close(theirs)
    shown = b""
    try:
        while b"3/9" not in shown:
            shown += os.read(ours, 4096)
        changed = {**read_status(run), "step": 4}
        (run / "new").write_text(json.dumps(changed))
        os.replace(run / "new", run / "status.json")
        while b"4/9" not in shown:
            shown += os.read(ours, 4096)
        os.write(ours, b"q") if end == "q" else process.send_signal(signal.SIGINT)
        while (more := read(ours)) and not shown.endswith(b"\0"):
            shown += more
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert shown.count(b"\x1b[?1049h") == shown.count(b"\x1b[?1049l") == 1  # another screen, and back
    assert b"\x1b[2J" not in shown  # it is never cleared, so nothing flickers
    after = shown.partition(b"\x1b[?1049l")[2]
    assert b"4/9" in after and b"interrupted: SIGTERM" in after


def read(terminal: int) -> bytes:
    """What came to a terminal; nothing once nobody has its other end."""
    try:
        return os.read(terminal, 4096)
    except OSError:
        return b""


def test_a_history_that_grows_is_read_as_the_whole_of_it(tmp_path: Path) -> None:
    generator = random.Random(5)
    rows = [
        {"kind": "train", "step": begin + step, "attempt": attempt, "train/loss": generator.random(), "x": 1}
        for attempt, begin in ((1, 0), (2, 20), (3, 10), (4, 40))
        for step in range(1, 31)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    followed, at = Followed(tmp_path, ("train/loss",)), 0
    assert followed.look() == []
    while at < len(text):
        at += generator.randint(1, 700)  # also in the middle of a line
        (tmp_path / "metrics.jsonl").write_text(text[:at])
        lines = text[:at].rpartition("\n")[0].splitlines()
        whole = [
            {name: row[name] for name in row if name != "x"} for row in effective(map(json.loads, lines))
        ]
        assert followed.look() == whole
    assert [row["step"] for row in whole] == [*range(1, 71)]
    (tmp_path / "metrics.jsonl").write_text(text[: len(text) // 9])  # begun anew
    assert followed.look()[0]["attempt"] == 1 and len(followed.rows) < 20


def test_a_sparkline_goes_from_the_lowest_to_the_highest_by_its_x() -> None:
    assert sparkline([(0, 1.0), (1, 2.0), (2, 3.0), (3, 4.0)], 4, "abcd") == "abcd"
    assert sparkline([(0, 4.0), (90, 1.0), (100, 1.0)], 10, "ab") == "bbbbbbbbba"
    assert sparkline([(5, 1.0)], 3) == "▁▁▁" and sparkline([], 3) == ""
    assert sparkline([(0, 0.0), (1, 2.0), (2, 0.0), (3, 2.0)], 2, "abc") == "aa"  # means are shown


def test_a_disk_that_fails_for_a_while_ends_no_look_at_the_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pace, "READ_SECONDS", 0.02)
    store, looks = dist.HashStore(), threading.Semaphore(0)
    store.set("at/0", pace.Pace().word())
    (tmp_path / "ranks.json.tmp").mkdir()  # nothing can be written there
    reader = pace.Reader(store, 1, tmp_path / "ranks.json", lambda words: looks.release() or "rank 0")
    assert all(looks.acquire(timeout=20) for _ in range(2)), "it goes on"
    (tmp_path / "ranks.json.tmp").rmdir()
    assert all(looks.acquire(timeout=20) for _ in range(3))
    reader.stop()
    assert json.loads((tmp_path / "ranks.json").read_text())["last"] == "rank 0"
