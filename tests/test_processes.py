"""What the tests stand on: forked ranks are processes like any other."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from tests.processes import Finished, lives
from tests.warm import Process


def add_up(number: int) -> None:
    """One of several ranks: says the sum of all their numbers."""
    dist.init_process_group("gloo")
    total = torch.tensor(number * (dist.get_rank() + 1))
    dist.all_reduce(total)
    print(dist.get_rank(), int(total))
    dist.destroy_process_group()


def test_a_function_of_a_test_is_called_on_several_ranks_that_know_of_each_other(
    ranks: Callable[..., list[Finished]],
) -> None:
    finished = ranks(4, add_up, 10)
    ends = [(rank.rc, rank.out) for rank in finished]
    assert ends == [(0, f"{number} 100\n") for number in range(4)], finished[0]


SCRIPT = """
import os, sys, time
if len(sys.argv) == 1:
    time.sleep(600)
print(sys.argv, __name__, os.getcwd(), os.environ.get("SIDE"))
sys.exit(int(sys.argv[1]))
"""


def test_a_forked_script_is_as_one_that_python_was_started_with(
    begin: Callable[..., Process], run: Callable[..., Finished], cli: Callable[..., Finished], tmp_path: Path
) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    expected: Any = run(sys.executable, "script.py", 5, env={"SIDE": "left"})
    assert cli("script.py", 5, env={"SIDE": "left"}) == expected
    assert expected.rc == 5
    for number in (signal.SIGKILL, signal.SIGTERM):
        process = begin("script.py")
        assert process.poll() is None
        process.send_signal(number)
        assert process.wait(30) == process.returncode == -number


def test_an_error_in_a_forked_script_is_shown(cli: Callable[..., Finished], tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("raise ArithmeticError('too much')\n")
    failed = cli("script.py")
    assert failed.rc == 1 and failed.err.endswith("ArithmeticError: too much\n"), failed


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux does it")
def test_nothing_outlives_tests_that_are_killed(
    start: Callable[..., Any], wait_for: Callable[..., None], tmp_path: Path
) -> None:
    (tmp_path / "script.py").write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)\n")
    said = tmp_path / "said"
    program = f"""
from pathlib import Path
from tests.warm import Process
if __name__ == "__main__":
    folder = Path({str(tmp_path)!r})
    Process(["script.py"], folder, {{}}, folder / "said", folder / "errors").wait()
"""
    (tmp_path / "tests_of_another.py").write_text(program)
    tests = start(sys.executable, "tests_of_another.py")
    wait_for(lambda: said.exists() and said.read_text().endswith("\n"), tests)
    forked = psutil.Process(int(said.read_text()))
    tests.kill()
    psutil.wait_procs([forked], timeout=30)
    assert not lives(forked)


def test_what_hangs_fails_its_test_and_is_gone(cli: Callable[..., Finished], tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    with pytest.raises(pytest.fail.Exception, match="still running after 1 s"):
        cli("script.py", timeout=1)
