"""Language modelling: bytes in sequences, loss and metrics by hand, small real trainings."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.bare_gpt import compare
from dist_train import load
from dist_train.config import UserError
from dist_train.data.text import Text, text
from dist_train.models.gpt import GPT
from dist_train.predict import load_model
from dist_train.record.history import read_metrics
from dist_train.tasks import Language
from dist_train.tools.generate import continue_prompt
from tests.distributed import ranks as jobs
from tests.processes import REPO, Finished

RECIPE = [
    "data.name=text", "data.root=texts", "data.args.context=32", "data.args.eval_files=held.txt",
    "data.workers=0", "model.name=gpt", "model.args.depth=2", "model.args.heads=2", "model.args.width=32",
    "model.args.dropout=0.1", "task.name=language", "optim.name=AdamW", "optim.lr=0.01",
    "train.batch_size=8", "threads=1", "wandb.mode=disabled", "device=cpu",
]  # fmt: skip


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Some of this project's own pages, of which one is held out."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for name, source, size in (("a", "LICENSE", 9000), ("b", "README.md", 3001), ("held", "LICENSE", 1999)):
        (folder / f"{name}.txt").write_bytes((REPO / source).read_bytes()[:size])
    return folder


def test_each_byte_of_all_files_is_a_target_exactly_once(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abcdefgh")
    (tmp_path / "b").write_bytes(b"")
    (tmp_path / "c").write_bytes(b"xyz")
    source = text(str(tmp_path), context=5)
    assert source is not None
    samples = [source[number] for number in range(len(source))]
    targets = torch.cat([targets for _, targets in samples])
    kept = targets[targets != -100]
    assert bytes(kept.tolist()) == b"abcdefgh\0\0xyz\0"
    inputs = torch.cat([inputs for inputs, _ in samples])[: len(kept)]
    assert bytes(inputs.tolist()) == b"\0abcdefgh\0\0xyz"
    assert len(targets) == 15
    assert (targets[len(kept) :] == -100).all()
    assert source.path(0).name == "a"
    assert source.path(2).name == "c"


def test_files_of_the_eval_set_are_not_trained_on_also_by_another_link(tmp_path: Path) -> None:
    (tmp_path / "real.txt").write_text("held out")
    (tmp_path / "alias.txt").symlink_to("real.txt")
    (tmp_path / "other.txt").write_text("trained on")
    (tmp_path / ".hidden").write_text("neither")
    train = text(str(tmp_path), True, 64, eval_files="real.txt")
    held = text(str(tmp_path), False, 64, eval_files="real.txt")
    assert train is not None
    assert held is not None
    assert [Path(os.fsdecode(path)).name for path in train.paths] == ["other.txt"]
    assert [Path(os.fsdecode(path)).name for path in held.paths] == ["real.txt"]


def test_what_is_no_text_to_read_is_told_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match=r"data\.root: there is no file"):
        text(str(tmp_path / "b.txt"))
    with pytest.raises(UserError, match=r"data\.args\.files: .* has no file '\*\.md'"):
        text(str(tmp_path), files="*.md")
    source = text(str(tmp_path / "a.txt"), context=4)
    assert source is not None
    (tmp_path / "a.txt").write_text("te")
    with pytest.raises(UserError, match="shorter than it was"):
        source[0]


def test_a_large_file_takes_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(8 * 2**30)  # as sparse as the disk has it
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    source = Text([path], context=256)
    for number in range(0, len(source), len(source) // 100):
        source[number]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17  # 128 MiB, in KiB


def test_what_follows_a_place_changes_nothing_before_it() -> None:
    torch.manual_seed(0)
    model = GPT(input_shape=(16,), depth=2, heads=2, width=32).eval()
    one = torch.randint(256, (1, 16))
    other = one.clone()
    other[0, 9:] = 7
    with torch.no_grad():
        assert torch.equal(model(one)[:, :9], model(other)[:, :9])
        assert not torch.allclose(model(one)[:, 9:], model(other)[:, 9:])


def test_loss_and_metrics_are_those_of_a_bare_loop() -> None:
    torch.manual_seed(0)
    model, task = GPT(input_shape=(8,), depth=1, heads=1, width=16).eval(), Language()
    inputs, targets = torch.randint(256, (3, 8)), torch.randint(256, (3, 8))
    targets[2, 3:] = -100
    batch: Any = SimpleNamespace(inputs=inputs, targets=targets)
    with torch.no_grad():
        values, weights = task.losses(model, batch)
        report = task.report(task.sums(model, batch))
        logs = model(inputs).double().log_softmax(2)
    places = [(row, place) for row in range(3) for place in range(8) if targets[row, place] >= 0]
    nats = [-float(logs[row, place, targets[row, place]]) for row, place in places]
    right = sum(int(logs[row, place].argmax() == targets[row, place]) for row, place in places)
    loss = sum(nats) / len(places)
    assert len(places) == 19
    assert float((values * weights).sum() / weights.sum()) == pytest.approx(loss, rel=1e-6)
    assert report["loss"] == pytest.approx(loss, rel=1e-6)
    assert report["perplexity"] == pytest.approx(math.exp(loss), rel=1e-6)
    assert report["bits_per_byte"] == pytest.approx(loss / math.log(2), rel=1e-6)
    assert report["accuracy"] == right / 19


def test_a_language_model_learns_and_goes_on_with_a_prompt_the_same_way(
    texts: Path, cli: Callable[..., Finished]
) -> None:
    folder = texts.parent
    jobs.train(folder, *RECIPE, "train.steps=150", "model.args.dropout=0")
    rows = [row for row in read_metrics(folder / "runs/run") if "eval/bits_per_byte" in row]
    assert rows[-1]["eval/bits_per_byte"] < 4.5  # 8 without a model
    run = folder / "runs/run"
    one, two = (continue_prompt(run, "The licen", length=20, seed=3) for _ in range(2))
    assert one == two
    assert one.startswith("The licen")
    assert continue_prompt(run, "The licen", length=20, seed=4) != one
    printed = [cli("predict", run, "The licen", "--length", "20", "--seed", "3") for _ in range(2)]
    assert printed[0].rc == 0, printed[0]
    assert printed[0].out == printed[1].out
    assert printed[0].out.startswith("The licen")
    model, saved = load_model(run)
    assert isinstance(model, GPT)
    assert saved["sample_shape"] == [32]


def test_evaluation_counts_each_byte_once_on_one_two_and_three_processes(texts: Path) -> None:
    found = []
    for processes in (1, 2, 3):
        name = f"run.name=w{processes}"
        jobs.train(
            texts.parent, *RECIPE, "train.steps=1", "train.batch_size=6", "optim.lr=0", "eval.batch_size=5",
            name, processes=processes,
        )  # fmt: skip
        found.append(jobs.last(texts.parent, f"w{processes}")["metrics"])
    for metrics in found:
        right = metrics["eval/accuracy"] * 2000  # 1,999 bytes and the end of the file
        assert abs(right - round(right)) < 1e-9
        assert metrics["eval/loss"] == pytest.approx(found[0]["eval/loss"], rel=1e-6)


def test_a_bare_loop_of_torch_learns_the_same(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a model, reading, loss, schedule, clipping and evaluation of its own."""
    monkeypatch.chdir(texts.parent)
    words = [*RECIPE, "model.args.dropout=0", "optim.args={weight_decay: 0.1}", "schedule.name=cosine",
             "schedule.warmup=10", "train.clip_norm=1", "train.steps=100", "eval.every=never"]  # fmt: skip
    ours, bare = compare(load([], words))
    assert ours < 5
    assert abs(ours - bare) < 1e-6


@pytest.mark.slow
def test_a_killed_language_run_that_threads_read_for_ends_with_the_same_bits(texts: Path) -> None:
    """Threads draw nothing: what dropout draws in the training is as without them."""
    arguments = [*RECIPE, "train.steps=80", "checkpoint.every=7", "log.every=5"]
    jobs.train(texts.parent, *arguments, "run.name=straight")
    ranks = jobs.start(jobs.train_command(*arguments, "run.name=killed", "data.workers=2"), 1, texts.parent)
    metrics = texts.parent / "runs/killed/metrics.jsonl"
    wait_for(lambda: metrics.exists() and _last_step(metrics) >= 20)
    os.killpg(ranks[0].pid, signal.SIGKILL)
    ranks[0].wait()
    jobs.train(texts.parent, *arguments, "run.name=killed", "data.workers=2")
    assert jobs.same_bits(jobs.last(texts.parent, "straight"), jobs.last(texts.parent, "killed"))


def wait_for(condition: Callable[[], bool]) -> None:
    """Waits, two minutes at most."""
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _last_step(metrics: Path) -> int:
    try:
        return int(json.loads(metrics.read_text().splitlines()[-1])["step"])
    except (ValueError, IndexError):
        return 0
