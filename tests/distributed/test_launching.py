"""Every way to start the same job gives the same weights; and none starts fewer processes in silence."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore

from dist_train.runtime import _agree
from tests.distributed.ranks import equal, last, train
from tests.processes import REPO, Finished, free_port

TRAIN = [
    "train", REPO / "configs/quickstart.yaml", "device=cpu", "wandb.mode=disabled", "train.epochs=null",
    "train.steps=20", "train.batch_size=16", "model.args.hidden=[16]", "threads=1",
    f"data.root={REPO / 'dist_train/assets'}",
]  # fmt: skip


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """The weights of one and of two processes that were started by hand."""
    folder = tmp_path_factory.mktemp("expected")
    for processes in (1, 2):
        train(folder, *map(str, TRAIN[1:]), f"run.name=by-hand-{processes}", processes=processes)
    return {processes: last(folder, f"by-hand-{processes}")["model"] for processes in (1, 2)}


def _tool(name: str) -> str:
    """A program of the environment that runs the tests."""
    return str(Path(sys.executable).parent / name)


def _launchers() -> dict[str, tuple[int, list[Any]]]:
    module = ["-m", "dist_train"]
    launch = [_tool("accelerate"), "launch", "--config_file"]
    return {
        "python -m dist_train": (1, [*module]),
        "accelerate cpu.yaml": (1, [*launch, REPO / "launch/cpu.yaml", *module]),
        "accelerate cpu_2.yaml": (2, [*launch, REPO / "launch/cpu_2.yaml", *module]),
        "torchrun": (
            2,
            [_tool("torchrun"), "--standalone", "--nproc_per_node", "2", *module],
        ),
        "dist-train launch": (2, [*module, "launch", "--nproc", "2"]),
    }


@pytest.mark.long
@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(name, marks=pytest.mark.nightly if name == "accelerate cpu.yaml" else ())
        for name in _launchers()
    ],
)
def test_each_launcher_runs_the_same_job(
    launcher: str, tmp_path: Path, run: Callable[..., Finished], expected: dict[int, Any]
) -> None:
    """In short one file of Accelerate: that for two processes."""
    processes, command = _launchers()[launcher]
    finished = run(*command, *(TRAIN[1:] if "launch" in launcher.split() else TRAIN), cwd=tmp_path)
    assert finished.rc == 0, finished
    assert finished.out.count("completed at step 20") == 1, finished
    assert f"{processes} process" in finished.err, finished
    assert equal(expected[processes], last(tmp_path, "quickstart")["model"])


@pytest.mark.nightly
def test_two_nodes_of_accelerate_make_one_run(
    tmp_path: Path, start: Callable[..., Any], expected: dict[int, Any]
) -> None:
    """Two launchers on this machine, as on two machines that share the run's folder.

    In short: two nodes of Slurm (test_srun_starts_ranks_without_any_launcher), and Accelerate on one.
    """
    port = free_port()
    nodes = [
        start(
            _tool("accelerate"), "launch", "--config_file", REPO / "launch/nodes.yaml",
            "--num_machines", 2, "--num_processes", 2, "--machine_rank", rank,
            "--main_process_ip", "127.0.0.1",
            "--main_process_port", port, "-m", "dist_train", *TRAIN, cwd=tmp_path,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [node.communicate(timeout=120) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert equal(expected[2], last(tmp_path, "quickstart")["model"])


@pytest.mark.parametrize("file", sorted((REPO / "launch").glob("*.yaml")), ids=lambda file: file.name)
def test_accelerate_itself_takes_each_file_and_the_command_in_its_head(file: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    loaded = load_config_from_file(str(file))  # refuses unknown keys
    processes = {"cpu_2": 2, "gpus": 8, "fsdp": 8, "nodes": 16}.get(file.stem, 1)
    assert (loaded.num_processes, loaded.use_cpu) == (processes, file.stem.startswith("cpu"))
    assert loaded.distributed_type == ("NO" if processes == 1 else "MULTI_GPU")
    assert loaded.mixed_precision == "no"  # the precision is the configuration's
    (head,) = re.findall(r"^#   (accelerate launch .+)$", file.read_text(), flags=re.M)
    words = shlex.split(head)
    told = launch_command_parser().parse_args(words[2:])
    assert (told.config_file, told.module) == (f"launch/{file.name}", True)
    assert (told.training_script, told.training_script_args[0]) == ("dist_train", "train")
    assert (REPO / told.training_script_args[1]).is_file()


@pytest.mark.slurm
@pytest.mark.parametrize("nodes", [1, 2])
def test_srun_starts_ranks_without_any_launcher(
    nodes: int, tmp_path: Path, expected: dict[int, Any], slurm: Any
) -> None:
    command = ["srun", f"-N{nodes}", "-n2", sys.executable, "-m", "dist_train", *TRAIN]
    finished = slurm.run(command, cwd=tmp_path)
    assert finished.returncode == 0, finished
    assert "2 processes" in finished.stderr
    assert equal(expected[2], last(tmp_path, "quickstart")["model"])


@pytest.mark.long
@pytest.mark.parametrize(
    "flags",
    [
        ["--cpu", "--num_processes", "2"],
        pytest.param(["--config_file", "multi_cpu.yaml"], marks=pytest.mark.nightly),
    ],
)
def test_fewer_processes_than_asked_for_is_an_error(
    flags: list[str], tmp_path: Path, run: Callable[..., Finished]
) -> None:
    """Accelerate starts one process for these, and says nothing. In short: only flags, no file."""
    (tmp_path / "multi_cpu.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nnum_processes: 2\nuse_cpu: true\n"
        "num_machines: 1\nmachine_rank: 0\nmixed_precision: 'no'\n"
    )
    finished = run(_tool("accelerate"), "launch", *flags, "-m", "dist_train", *TRAIN, cwd=tmp_path)
    assert finished.rc != 0
    assert finished.err.count("accelerate was asked for 2 processes but started 1") == 1, finished
    assert not (tmp_path / "runs").exists()


@pytest.mark.long
def test_accelerates_own_settings_do_not_change_the_training(
    tmp_path: Path, run: Callable[..., Finished], expected: dict[int, Any]
) -> None:
    settings = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": 4, "ACCELERATE_MIXED_PRECISION": "bf16"}
    finished = run("-m", "dist_train", *TRAIN, cwd=tmp_path, env=settings)
    assert finished.rc == 0, finished
    assert equal(expected[1], last(tmp_path, "quickstart")["model"])


def test_restarted_ranks_agree_whatever_the_ranks_before_them_left_in_the_store() -> None:
    """torchrun keeps its store over restarts; those of before may have died in the middle of anything."""
    store = HashStore()
    names = []
    for _ in range(3):
        for rank in (1, 2):
            store.set(f"greeting/{rank}", f"of a dead rank {rank}")
        with ThreadPoolExecutor() as pool:
            told = [pool.submit(_agree, store, rank, 3, 30.0) for rank in (0, 2, 1)]
        assert len({name.result() for name in told}) == 1
        names.append(told[0].result())
    assert len(set(names)) == 3
    with pytest.raises(RuntimeError, match=r"ranks \[1, 2\] have not come"):
        _agree(store, 0, 3, 0.1)
