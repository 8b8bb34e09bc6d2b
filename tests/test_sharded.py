"""Sharded checkpoints: each rank writes its part; whole or not there, with the bits of a single file."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from dist_train import checkpoint
from dist_train.checkpoint import sharded, sharded_saver
from dist_train.checkpoint.files import Damaged
from dist_train.checkpoint.sharded_saver import ShardedCheckpoints
from dist_train.config import UserError
from dist_train.rows import rows_of
from tests.distributed.group import Group, on_ranks
from tests.distributed.ranks import equal
from tests.faults.operations import watch

FOLDER = Path("runs/run/checkpoints")


def whole_state(step: int, best: int | None = None) -> dict[str, Any]:
    """A state as one process has it: tensors of many shapes and types, and all kinds of plain values."""
    g = torch.Generator().manual_seed(step)
    model = {
        "even.weight": torch.randn(8, 5, generator=g),
        "odd.weight": torch.randn(7, 3, 2, generator=g).bfloat16(),
        "short/weight": torch.randn(2, generator=g),
        "one": torch.randn(1, 4, generator=g),
        "large": torch.randn(600, 500, generator=g),
        "scalar": torch.tensor(3.5),
        "counter": torch.tensor(12),
        "mask": torch.rand(5, 5, generator=g) > 0.5,
        "none": torch.empty(0, 3),
        "strided": torch.randn(3, 4, generator=g).t(),
    }
    moments = {name: {"step": torch.tensor(12.0), "exp_avg": value * 2} for name, value in model.items()}
    groups = [{"lr": 0.1, "betas": (0.9, 0.999), "params": [*model], "fused": None}]
    numbers = {"format": checkpoint.FORMAT, "step": step, "best": best, "best_step": best, "scaler": None}
    return numbers | {
        "config": {"$odd": {"a": [1, 2.5, "ü\udc80"]}, "bytes": b"\x00\xff", 3: None, (1, "x")[0]: ()},
        "model": model,
        "average": None,
        "optimizer": {"state": moments, "param_groups": groups},
        "metrics": {"eval/loss": 0.1 + 0.2},
        "window": {"loss": [float("inf"), -0.0, 1e-300]},
        "parts": 4,
        "world_size": 2,
        "classes": ["a"],
        "sample_shape": [1],
    }  # fmt: skip


SHARDED = ("even.weight", "odd.weight", "short/weight", "one", "mask", "none")


def spread_state(whole: dict[str, Any], world_size: int, mesh_shape: tuple[int, ...] = ()) -> dict[str, Any]:
    """The same state with some of its tensors sharded over all ranks, as FSDP2 has them."""
    mesh = init_device_mesh("cpu", mesh_shape or (world_size,))
    placements = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]

    def spread(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        return {n: distribute_tensor(t, mesh, placements) if n in SHARDED else t for n, t in tensors.items()}

    moments = {
        name: {"step": values["step"], "exp_avg": spread({name: values["exp_avg"]})[name]}
        for name, values in whole["optimizer"]["state"].items()
    }
    return whole | {
        "model": spread(whole["model"]),
        "optimizer": whole["optimizer"] | {"state": moments},
    }  # fmt: skip


def bits(value: Any) -> Any:
    """`value` with each tensor as its type, shape and bytes: equal only if all bits are."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.contiguous().reshape(-1).view(torch.uint8).tolist()
    if isinstance(value, dict):
        return {key: bits(item) for key, item in value.items()}
    return [bits(item) for item in value] if isinstance(value, list) else repr(value)


def opened(group: Group, keep: int = 2) -> ShardedCheckpoints:
    return ShardedCheckpoints(Path("runs/run"), keep, print, group, seconds=60)


def save(group: Group, *steps: int, mesh: tuple[int, ...] = ()) -> None:
    saver = opened(group)
    for step in steps:
        saver.save(spread_state(whole_state(step), group.world_size, mesh))
    assert saver.wait() == ""


# --- the same bits ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("processes", "mesh"), [(1, ()), (2, ()), (4, ()), (4, (2, 2))])
def test_what_ranks_have_written_is_read_by_one_process_to_the_same_bits(
    processes: int, mesh: tuple[int, ...], tmp_path: Path
) -> None:
    (tmp_path / FOLDER.parent).mkdir(parents=True)
    assert on_ranks(processes, _save_with_mesh, mesh, cwd=tmp_path) == [0] * processes
    path = checkpoint.find(tmp_path / FOLDER.parent)
    assert path.name == "step-00000012.sharded"
    assert sorted(item.name for item in path.iterdir()) == [
        "manifest.json", *(f"part-{rank:05d}.safetensors" for rank in range(processes)),
    ]  # fmt: skip
    assert bits(checkpoint.load(path)) == bits(whole_state(12))
    written = sum(file.stat().st_size for file in path.glob("part-*"))
    assert checkpoint.size_of(path) == written
    numbers = sum(t.numel() * t.element_size() for t in tensors_of(whole_state(12)))
    assert numbers < written < numbers + 5_000 * processes  # each row once


def _save_with_mesh(group: Group, mesh: tuple[int, ...]) -> None:
    save(group, 12, mesh=mesh)


def tensors_of(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for item in items for tensor in tensors_of(item)]


@pytest.mark.parametrize("readers", [1, 2, 3])
def test_each_rank_reads_its_own_rows_whatever_the_number_of_writers(readers: int, tmp_path: Path) -> None:
    (tmp_path / FOLDER.parent).mkdir(parents=True)
    assert on_ranks(2, save, 12, cwd=tmp_path) == [0, 0]
    assert on_ranks(readers, _read_rows, cwd=tmp_path) == [0] * readers


def _read_rows(group: Group) -> None:
    mine = spread_state(whole_state(12), group.world_size)
    of_name: dict[str, torch.Tensor] = {}
    sharded_saver.flatten(mine, "", of_name)
    asked: dict[str, int] = {}

    def wanted(name: str, shape: torch.Size) -> tuple[int, int]:
        assert shape == of_name[name].shape
        first, count = rows_of(of_name[name])
        asked[name] = count
        return first, count

    read = checkpoint.load(FOLDER / "step-00000012.sharded", wanted=wanted)
    local = {name: t.to_local() if isinstance(t, DTensor) else t for name, t in mine["model"].items()}
    assert bits(read["model"]) == bits(local)
    if group.world_size > 1:
        assert asked["model/even.weight"] < 8


def test_large_tensors_that_all_ranks_hold_are_shared_among_them_and_small_ones_are_rank_0s(
    tmp_path: Path,
) -> None:
    (tmp_path / FOLDER.parent).mkdir(parents=True)
    assert on_ranks(2, save, 12, cwd=tmp_path) == [0, 0]
    tensors = sharded.read_manifest(tmp_path / FOLDER / "step-00000012.sharded")["tensors"]
    holders = {name: [file for file, *_ in entry["rows"]] for name, entry in tensors.items()}
    large = {holders["model/large"][0], holders["optimizer/state/large/exp_avg"][0]}
    assert large == {"part-00000.safetensors", "part-00001.safetensors"}
    assert holders["model/counter"] == ["part-00000.safetensors"]


def test_what_could_not_be_read_back_is_refused_by_its_name() -> None:
    for value, told in ((object(), "model/a is a object"), (torch.ones(2).to_sparse(), "can't hold model/a")):
        with pytest.raises(UserError, match=told):
            sharded_saver.cut({"model": {"a": value}}, 0, 1)


# --- whole or not there ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints of two ranks after steps 8 and 12."""
    folder = tmp_path_factory.mktemp("saved")
    (folder / FOLDER.parent).mkdir(parents=True)
    assert on_ranks(2, save, 8, 12, cwd=folder) == [0, 0]
    return folder / FOLDER


@pytest.fixture
def newest(saved: Path, tmp_path: Path) -> Path:
    """A copy of the newest one of them."""
    path = tmp_path / "step-00000012.sharded"
    path.mkdir()
    for file in (saved / path.name).iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path


def test_a_flipped_bit_anywhere_is_found_or_changes_nothing(newest: Path) -> None:
    good = bits(checkpoint.load(newest))
    for file in newest.iterdir():
        content = file.read_bytes()
        for at in [*range(0, len(content), len(content) // 40), len(content) - 1]:
            file.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
            try:
                assert bits(checkpoint.load(newest)) == good
            except Damaged as error:
                assert str(newest) in str(error)
            else:
                assert file.name == "manifest.json"
        file.write_bytes(content)
    assert bits(checkpoint.load(newest)) == good


@pytest.mark.parametrize("name", ["manifest.json", "part-00000.safetensors", "part-00001.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "longer"])
def test_a_missing_or_truncated_file_is_found_without_reading_it_all(
    damage: str, name: str, newest: Path
) -> None:
    content = (newest / name).read_bytes()
    changed = {"truncated": content[:-1], "empty": b"", "longer": content + b"x"}
    (newest / name).unlink() if damage == "missing" else (newest / name).write_bytes(changed[damage])
    with pytest.raises(Damaged, match=str(newest)):
        sharded.read_manifest(newest)
    assert not checkpoint.is_whole(newest)
    with pytest.raises(Damaged):
        checkpoint.find(newest)


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes the manifest, with the checksum that belongs to it."""
    manifest = json.loads((path / "manifest.json").read_bytes())["manifest"]
    change(manifest)
    digest = hashlib.sha256(sharded.dump(manifest)).hexdigest()
    (path / "manifest.json").write_bytes(sharded.dump({"sha256": digest, "manifest": manifest}))


def _tensor(manifest: dict[str, Any], **changes: Any) -> None:
    manifest["tensors"]["model/even.weight"].update(changes)


HOSTILE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a path out of the folder": lambda m: m["files"].update({"../../secret": {"size": 6, "sha256": ""}}),
    "an absolute path": lambda m: m["files"].update({"/etc/passwd": {"size": 6, "sha256": ""}}),
    "a tensor of no end": lambda m: _tensor(m, shape=[2**50, 5], rows=[["part-00000.safetensors", 0, 2**50]]),
    "rows of no end": lambda m: _tensor(
        m, shape=[2**40, 5], rows=[["part-00000.safetensors", 0, 4], ["part-00001.safetensors", 4, 2**40 - 4]]
    ),
    "a file that is read again and again": lambda m: _tensor(
        m, shape=[4000, 5], rows=[["part-00000.safetensors", n * 4, 4] for n in range(1000)]
    ),
    "rows that overlap": lambda m: _tensor(
        m, rows=[["part-00000.safetensors", 0, 4], ["part-00001.safetensors", 2, 4]]
    ),
    "rows that are missing": lambda m: _tensor(m, rows=[["part-00000.safetensors", 0, 4]]),
    "negative numbers": lambda m: _tensor(m, shape=[-8, -5]),
    "numbers that are texts": lambda m: _tensor(m, shape=["8", 5]),
    "another type": lambda m: _tensor(m, dtype="I32"),
    "an unknown type": lambda m: _tensor(m, dtype="torch.float32"),
    "a tensor that no file has": lambda m: m["tensors"].update(new=m["tensors"]["model/scalar"]),
    "a state of another kind": lambda m: m.update(state=[1, 2]),
    "an unknown word": lambda m: m["state"].update(model={"$call": "os.system"}),
    "a tensor by an unknown name": lambda m: m["state"].update(model={"$tensor": "x"}),
    "keys that can't be keys": lambda m: m["state"].update(model={"$items": [[{"$items": []}, 1]]}),
    "no files": lambda m: m.update(files=None),
    "a newer format": lambda m: m.update(format=99),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_manifest_is_not_believed(what: str, newest: Path) -> None:
    (newest.parent / "secret").write_bytes(b"secret")
    rewrite(newest, HOSTILE[what])
    with pytest.raises(UserError, match="sharded"):
        checkpoint.load(newest)


def test_a_manifest_that_is_nested_without_end_is_refused(newest: Path) -> None:
    (newest / "manifest.json").write_bytes(b"[" * 100_000)
    with pytest.raises(Damaged, match="damaged"):
        checkpoint.load(newest)


def test_a_part_that_is_a_link_to_another_file_is_refused(newest: Path) -> None:
    part = newest / "part-00001.safetensors"
    part.rename(newest.parent / "elsewhere")
    part.symlink_to(newest.parent / "elsewhere")
    with pytest.raises(Damaged, match="part-00001"):
        checkpoint.load(newest)


def test_of_a_damaged_newest_the_one_before_it_is_used(saved: Path, newest: Path) -> None:
    (newest.parent / "step-00000008.sharded").symlink_to(saved / "step-00000008.sharded")
    (newest / "part-00001.safetensors").unlink()
    told: list[str] = []
    found = checkpoint.newest_good(newest.parent, told.append)
    assert found and checkpoint.step_of(found) == 8
    assert "passed over" in told[0]


# --- ranks that fail or die ------------------------------------------------------------------------


def test_a_save_that_fails_on_any_rank_is_told_on_all_and_the_next_one_tries_again(tmp_path: Path) -> None:
    (tmp_path / FOLDER.parent).mkdir(parents=True)
    assert on_ranks(2, _fail_once, cwd=tmp_path) == [0, 0]
    names = sorted(path.name for path in (tmp_path / FOLDER).iterdir())
    assert names == ["last.sharded", "step-00000001.sharded", "step-00000005.sharded"]


def _fail_once(group: Group) -> None:
    told: list[str] = []
    saver = ShardedCheckpoints(Path("runs/run"), 2, told.append, group, seconds=60)
    real = sharded_saver.write_part

    def full(folder: Path, rank: int, part: Any) -> None:
        raise OSError(28, "No space left on device")

    def mute(folder: Path, rank: int, part: Any) -> None:
        (folder / f"rank-{rank}.json.tmp").mkdir()  # not even that can be told
        raise OSError(28, "No space left on device")

    saver.save(spread_state(whole_state(1), 2))
    for step, failing, way in ((2, 0, full), (3, 1, full), (4, 1, mute)):
        saver.wait()
        sharded_saver.write_part = way if group.rank == failing else real
        saver.save(spread_state(whole_state(step), 2))
        failure = saver.wait()
        assert failure == saver.wait()
        assert f"step-{step:08d}.sharded could not be written" in failure, failure
        assert "No space left on device" in failure and (failing == 0 or "rank 1" in failure), failure
        assert not saver.is_broken
        assert not list(FOLDER.glob("*.tmp"))
    sharded_saver.write_part = real
    bad = whole_state(5)
    bad["model"]["even.weight"][7] = torch.nan  # a row that only rank 1 has
    saver.save(spread_state(bad, 2))
    assert "the weights are not finite (even.weight)" in saver.wait()
    saver.save(spread_state(whole_state(5), 2))
    assert saver.wait() == ""
    assert len(told) == (4 if group.rank == 0 else 0)


def test_a_rank_that_is_gone_does_not_keep_rank_0_for_long(tmp_path: Path) -> None:
    (tmp_path / FOLDER.parent).mkdir(parents=True)
    assert on_ranks(2, _lose_rank_1, cwd=tmp_path) == [0, -9]
    assert [path.name for path in checkpoint.newest_first(tmp_path / FOLDER)] == ["step-00000001.sharded"]


def _lose_rank_1(group: Group) -> None:
    saver = opened(group)
    saver.save(spread_state(whole_state(1), 2))
    second = spread_state(whole_state(2), 2)
    sharded_saver.GRACE_SECONDS = 0.5
    if group.rank == 1:
        sharded_saver.write_part = lambda *part: os.kill(os.getpid(), signal.SIGKILL)
    saver.save(second)
    saver.close()  # as the run does that has met with the death of a rank
    assert "the part of rank 1 has not come" in saver.failure
    os._exit(0)


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 1])
def test_wherever_a_rank_is_killed_there_is_a_whole_checkpoint_and_the_next_attempt_goes_on(
    rank: int, saved: Path, tmp_path: Path
) -> None:
    """Killed ahead of every third operation on files; after each other kill there is a next attempt."""
    good = {step: bits(whole_state(step)) for step in (8, 12, 16)}
    kill_at, codes = 1, [0, -9]
    while codes != [0, 0]:  # until there is no such operation on files
        cwd = tmp_path / str(kill_at)
        shutil.copytree(saved / "step-00000008.sharded", cwd / FOLDER / "step-00000008.sharded")
        codes = on_ranks(2, _save_killed, rank, kill_at, cwd=cwd)
        assert codes in ([0, 0], [-9, 1], [1, -9])
        found = checkpoint.newest_first(cwd / FOLDER)
        assert found
        for path in found:
            assert bits(checkpoint.load(path)) == good[checkpoint.step_of(path)]
        if kill_at % 2 == 0:
            assert on_ranks(2, save, 16, cwd=cwd) == [0, 0]
            assert not list((cwd / FOLDER).glob("*.tmp"))
            assert bits(checkpoint.load(cwd / FOLDER / "last.sharded")) == good[16]
        kill_at += 3
    assert [checkpoint.step_of(path) for path in found] == [12]
    assert kill_at > 5  # there was something to kill


def _save_killed(group: Group, rank: int, kill_at: int) -> None:
    saver = opened(group, keep=1)
    state = spread_state(whole_state(12), 2)
    sharded_saver.GRACE_SECONDS = 0.5
    if group.rank == rank:
        watch(kill_at)
    try:
        saver.save(state)
        saver.wait()
    except RuntimeError:  # the other one was killed
        saver.close()
        os._exit(1)


# --- names, links, what is kept --------------------------------------------------------------------


def test_the_newest_and_the_best_are_kept_and_links_are_of_the_kind_of_their_files(tmp_path: Path) -> None:
    (tmp_path / FOLDER.parent).mkdir(parents=True)
    assert on_ranks(2, _save_many, cwd=tmp_path) == [0, 0]
    folder = tmp_path / FOLDER
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["best.sharded", "last.sharded", "step-00000002.sharded", "step-00000005.sharded",
                     "step-00000006.sharded"]  # fmt: skip
    assert os.readlink(folder / "best.sharded") == "step-00000002.sharded"
    single = checkpoint.Checkpoints(tmp_path / FOLDER.parent, keep=2, say=print)
    single.go_on(6, 2.0, 2)
    single.save(whole_state(7, best=2))
    single.save(whole_state(8, best=8))
    single.wait()
    assert sorted(path.name for path in folder.iterdir()) == [
        "best.pt", "last.pt", "step-00000007.pt", "step-00000008.pt",
    ]  # fmt: skip
    assert checkpoint.is_linked(folder, 8, 8) and not checkpoint.is_linked(folder, 7, 8)


def _save_many(group: Group) -> None:
    saver = opened(group)
    for step in range(1, 7):
        saver.save(spread_state(whole_state(step, best=2 if step > 1 else None), 2))
    saver.wait()
    assert saver.best_step == 2


def test_a_step_that_is_saved_again_as_another_kind_takes_the_place_of_the_first(tmp_path: Path) -> None:
    run = tmp_path / "runs/run"
    single = checkpoint.Checkpoints(run, keep=2, say=print)
    single.save(whole_state(12))
    single.wait()
    for _ in range(2):
        assert on_ranks(2, save, 12, cwd=tmp_path) == [0, 0]
        (path,) = checkpoint.newest_first(tmp_path / FOLDER)
        assert path.suffix == ".sharded" and checkpoint.step_of(path) == 12
        assert checkpoint.is_linked(tmp_path / FOLDER, 12, None)
    single = checkpoint.Checkpoints(run, keep=2, say=print)
    single.save(whole_state(12) | {"window": {"loss": [7.0]}})
    single.wait()
    (path,) = checkpoint.newest_first(tmp_path / FOLDER)
    assert path.suffix == ".pt" and checkpoint.load(path)["window"] == {"loss": [7.0]}
    assert sorted(p.name for p in (tmp_path / FOLDER).iterdir()) == ["last.pt", path.name]


def test_a_sharded_and_a_single_checkpoint_hold_the_same_bits(saved: Path, tmp_path: Path) -> None:
    single = checkpoint.Checkpoints(tmp_path, keep=2, say=print)
    single.save(checkpoint.load(saved / "step-00000012.sharded"))
    single.wait()
    one, other = checkpoint.load(tmp_path / "checkpoints/last.pt"), whole_state(12)
    assert equal(one["model"], other["model"]) and equal(one["optimizer"], other["optimizer"])
