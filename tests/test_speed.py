"""How fast a training is, and how fast it could be: waiting for data, FLOPs, memory."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dist_train import flops, models
from dist_train.meters import Clock
from dist_train.record.account import SECONDS
from dist_train.record.history import read_metrics
from dist_train.tools.profiler import Stopwatch
from tests.processes import Finished


def test_a_row_tells_the_share_of_time_that_loop_and_device_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = Clock(dict.fromkeys(SECONDS, 0.0))
    for waited, device_waited in ((3.0, 2.0), (1.0, 0.0)):
        clock.step(samples=40)
        now[0] += 8
        clock.settle(waited, device_waited)
    row = clock.take(steps_left=10, most_per_second=50.0)
    assert row == {
        "perf/samples_per_second": 5,
        "perf/data_share": 0.25,
        "perf/device_wait_share": 0.125,
        "perf/seconds_left": 80,
        "perf/mfu": 0.1,
    }
    assert clock.account["waiting for data"] == 4 and clock.account["productive"] == 12
    clock.settle(0, 0)
    assert "perf/mfu" not in clock.take(steps_left=10, most_per_second=None)


def test_a_cpu_waits_for_data_as_long_as_the_loop_and_tells_no_mfu(
    small: list[str], here: Callable[..., Any], tmp_path: Path
) -> None:
    here(*small)
    rows = [row for row in read_metrics(tmp_path / "runs/run") if row["kind"] == "train"]
    assert len(rows) == 3
    for row in rows:
        assert 0 < row["perf/device_wait_share"] == row["perf/data_share"] < 1
        assert row["perf/memory_gb"] > 0 and "perf/mfu" not in row


def test_mfu_is_the_share_of_what_the_device_could_do(
    small: list[str], here: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(flops.PEAK, "cpu", (1e12, 5e11))
    job = [*small, "model.args.hidden=[32]", "precision=bf16", "train.ema=0.9"]
    here(*job)
    per_sample = 3 * 2 * (64 * 32 + 32 * 3)
    rows = [row for row in read_metrics(tmp_path / "runs/run") if row["kind"] == "train"]
    assert rows
    for row in rows:
        assert row["perf/mfu"] == pytest.approx(row["perf/samples_per_second"] * per_sample / 1e12, rel=2e-3)
    monkeypatch.delitem(flops.PEAK, "cpu")
    here(*job, "run.name=other")  # counting leaves no trace in the run
    one, other = (
        torch.load(tmp_path / f"runs/{name}/checkpoints/last.pt", weights_only=True)
        for name in ("run", "other")
    )
    assert all(torch.equal(value, other["average"][name]) for name, value in one["average"].items())


@pytest.mark.parametrize(
    ("device", "precision", "expected"),
    [
        ("NVIDIA H200", "bf16", 989e12),
        ("NVIDIA H100 80GB HBM3", "fp16", 989e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA A100-SXM4-80GB", "tf32", 156e12),
        ("NVIDIA A100-SXM4-80GB", "fp32", None),  # of which cuDNN computes some in tf32
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", "bf16", None),  # a part of it
        ("NVIDIA L4", "bf16", 121e12),
        ("NVIDIA A10G", "bf16", None),
        ("cpu", "bf16", None),
    ],
)
def test_the_peak_of_a_device_is_known_by_its_name(
    device: str, precision: str, expected: float | None
) -> None:
    assert flops.peak(device, precision) == expected


def test_flops_of_a_training_step_are_those_of_three_forward_passes() -> None:
    images = torch.zeros(2, 3, 224, 224)
    resnet = models.build("resnet18", {}, (3, 224, 224), 1000)
    assert flops.of_training(resnet, images) == pytest.approx(3 * 2 * 1.814e9, rel=1e-3)
    length, width = 16, 32
    gpt = models.build("gpt", {"width": width, "depth": 1, "heads": 2}, (length,), 256)
    forward = 2 * length * (12 * width**2 + 256 * width) + 4 * length**2 * width
    assert flops.of_training(gpt, torch.zeros(2, length, dtype=torch.int64)) == 3 * forward


def test_a_model_that_looks_at_numbers_has_no_known_flops_and_is_left_as_it_is() -> None:
    class Looking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.BatchNorm1d(4), nn.Linear(4, 2)

        def forward(self, values: torch.Tensor) -> torch.Tensor:
            values = self.norm(values)
            return self.linear(values if values.sum() > 0 else -values)

    model = Looking()
    assert flops.of_training(model, torch.zeros(2, 4)) is None
    assert model.norm.num_batches_tracked == 0
    assert model.linear.weight.device.type == "cpu"


# --- dist-train profile ------------------------------------------------------------------------------


def shares(text: str, first: str) -> dict[str, float]:
    """The last column, in %, of the table whose heading begins with `first`."""
    lines = text[text.index(first) :].split("\n\n")[0].splitlines()[1:]
    return {line.split()[0]: float(line.split()[-1].rstrip("%")) for line in lines}


def test_a_profile_tells_where_the_time_goes_and_leaves_a_trace_alone(
    small: list[str], cli: Callable[..., Finished], tmp_path: Path
) -> None:
    command = ["profile", *small, "train.accumulate=2", "--steps=5", "--trace=trace.json"]
    finished = cli(*command)
    assert (finished.rc, finished.err) == (0, ""), finished
    phases, operators = shares(finished.out, "phase"), shares(finished.out, "operator")
    assert list(phases) == ["data", "forward", "backward", "optimizer", "other"]
    assert all(0 < share < 100 for share in phases.values())
    assert sum(phases.values()) == pytest.approx(100, abs=0.5)
    assert "aten::addmm" in operators and 0 < sum(operators.values()) <= 100.5
    names = {event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert {"data", "forward", "backward", "Optimizer.step#SGD.step", "aten::addmm"} <= names
    assert sorted(path.name for path in tmp_path.iterdir()) == ["arrays.npz", "trace.json"]
    before = (tmp_path / "trace.json").read_bytes()
    refused = cli(*command)
    assert refused.rc == 2 and refused.err.count("\n") == 1 and "trace.json exists already" in refused.err
    assert (tmp_path / "trace.json").read_bytes() == before
    refused = cli("profile", *small, "--trace=none/trace.json")
    assert refused.rc == 2 and "none is no folder" in refused.err


def test_several_processes_are_profiled_together_and_the_first_one_tells(
    small: list[str], ranks: Callable[..., list[Finished]]
) -> None:
    """Longer than the run, whose schedule ends at its twelfth step."""
    first, second = ranks(2, "profile", *small, "--steps=15", "schedule.name=cosine", "precision=bf16")
    assert (first.rc, second.rc, second.out) == (0, 0, ""), (first, second)
    assert "(15 steps)" in first.out and "c10d::allreduce_" in first.out, first


def test_a_stopwatch_gives_each_phase_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def work(seconds: float) -> float:
        now[0] += seconds
        return seconds

    watch = Stopwatch(torch.device("cpu"))
    forward, optimizer = watch.watched("forward", work), watch.watched("optimizer", work)
    watch.mark("other")
    assert forward(3.0) == 3
    work(1.0)
    optimizer(seconds=4.0)
    forward(2.0)
    work(5.0)
    watch.mark("other")
    loop, device = watch.seconds()
    assert loop == {"data": 0, "forward": 5, "backward": 0, "optimizer": 4, "other": 6}
    assert device is None
