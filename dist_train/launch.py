"""`dist-train launch`: ranks on this machine that are forked from a process which has imported everything.

The launcher imports torch and this package once, before the first fork; it runs no thread, asks no GPU and
imports nothing of the user's, so it can be forked at any time. A rank that was killed is replaced: where the
others are in their loop they go on with the new one (cluster/board.py, checkpoint/memory.py), else all are
started anew, from the newest checkpoint.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import struct
import sys
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

# With all that ranks import, also later on: DDP asks for torch._dynamo, which takes seconds.
import torch._dynamo  # noqa: F401
from torch.distributed import TCPStore

import dist_train.train  # noqa: F401
from dist_train.cluster import board as boards
from dist_train.cluster.board import Board
from dist_train.guard.interrupt import SIGNALS
from dist_train.runtime import allowed_cpus

FORWARDED = {getattr(signal, name) for name in SIGNALS}
WATCHED = FORWARDED | {signal.SIGCHLD, signal.SIGALRM}
SETTLE_SECONDS = 2  # ranks train for so long before a spare process takes its share of the CPUs
END_SECONDS = 30  # for the others to end by themselves, when a rank has failed
HOST = "127.0.0.1"


class Plan(NamedTuple):
    """What is to be launched."""

    processes: int
    max_restarts: int
    prepare: Callable[[], object] | None  # what a spare process does until it is needed; None: no spare


def launch(plan: Plan) -> int | None:
    """Starts the ranks and looks after them. Returns in each process, as os.fork does.

    In the launcher: the exit code, of the first rank that ended otherwise than with 0. In a rank: None; its
    environment tells which one it is.
    """
    boards.current = Board(plan.processes)
    # Until a rank has its own handlers, and in the launcher always, signals wait to be asked for.
    signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
    gc.freeze()  # forked processes share the memory of all that is here until now
    return Launcher(plan, boards.current).run()


class Launcher:
    """The parent of the ranks. Methods that fork return whether this is the forked process."""

    def __init__(self, plan: Plan, board: Board) -> None:
        self.plan, self.board, self.pid = plan, board, os.getpid()
        self.restarts = plan.max_restarts
        self.ranks: dict[int, int] = {}  # of each rank that lives, by its process
        self.spare: tuple[int, int] | None = None  # its process, and where it is told its rank
        self.store: tuple[int, int] = (0, 0)  # its process and its port
        self.code = 0
        self.asked = False  # whether a signal has asked all to stop

    def run(self) -> int | None:
        """Starts the ranks and looks after them until the last one has ended: see `launch`."""
        if self._fill(range(self.plan.processes)):
            return None
        while self.ranks:
            number = signal.sigwait(WATCHED)
            if number in FORWARDED:
                self.asked = True
                self._send(number)
            if number == signal.SIGALRM:
                self._send(signal.SIGKILL)
            if (killed := self._reap()) and self._replace(killed):
                return None
        self._kill([pid for pid, _ in filter(None, (self.spare, self.store))])
        return self.code

    def _fill(self, places: Iterable[int]) -> bool:
        """Starts a process for each of these ranks."""
        if not self.store[0]:
            self.store = _start_store(self.pid)
        for rank in places:
            if self.spare:
                (pid, pipe), self.spare = self.spare, None
                os.write(pipe, struct.pack("i", rank))
                os.close(pipe)
            elif (pid := os.fork()) == 0:
                return self._become(rank)
            self.ranks[pid] = rank
        return self._start_spare()

    def _become(self, rank: int) -> bool:
        """What a forked process does first."""
        local = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": HOST, "MASTER_PORT": self.store[1]}
        world = {"WORLD_SIZE": self.plan.processes, "LOCAL_WORLD_SIZE": self.plan.processes}
        os.environ.update({name: str(value) for name, value in (local | world).items()})
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # torch's word for a store that no rank keeps
        # Else Accelerate warns, and sets a number of its own.
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, allowed_cpus() // self.plan.processes)))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD, signal.SIGALRM})
        return True

    def _start_spare(self) -> bool:
        """Starts a process that prepares itself, then waits until it is needed."""
        if self.spare or not self.plan.prepare:
            return False
        reads, writes = os.pipe()
        if pid := os.fork():
            os.close(reads)
            self.spare = pid, writes
            return False
        since = time.monotonic()  # when not all ranks were in their loop
        while time.monotonic() - since < SETTLE_SECONDS and not select.select([reads], [], [], 0.5)[0]:
            _end_without(self.pid)
            if not self.board.are_ready(range(self.plan.processes)):
                since = time.monotonic()
        with contextlib.suppress(Exception):  # whatever it is, the rank that it becomes meets it, too
            self.plan.prepare()
        while not select.select([reads], [], [], 1.0)[0]:
            _end_without(self.pid)
        return self._become(struct.unpack("i", os.read(reads, 4))[0])

    def _reap(self) -> list[int]:
        """The ranks that were killed since it was asked last; keeps the exit code of one that has failed."""
        killed: list[int] = []
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return killed
            if pid == 0:
                return killed
            if pid == self.store[0]:
                self.store = 0, 0
            elif self.spare and pid == self.spare[0]:
                os.close(self.spare[1])
                self.spare = None
            elif (rank := self.ranks.pop(pid, None)) is not None:
                code = os.waitstatus_to_exitcode(status)
                if code < 0:
                    killed.append(rank)
                    _say(f"rank {rank}, process {pid}, was killed by {signal.Signals(-code).name}")
                elif code:
                    self._fail(code)

    def _replace(self, killed: list[int]) -> bool:
        """Starts processes in the place of ranks that were killed, or all ranks anew."""
        if self.asked or self.code or not self.restarts:
            self._fail(1)
            return False
        self.restarts -= 1
        is_whole = len(self.ranks) + len(killed) == self.plan.processes  # none has ended meanwhile
        if self.ranks and is_whole and self.store[0] and self.board.are_ready(self.ranks.values()):
            _say(f"another process takes its place; restarts left: {self.restarts}")
        else:
            _say(f"all ranks start anew, from the newest checkpoint; restarts left: {self.restarts}")
            self._kill(self.ranks)
            self.ranks.clear()
            killed = list(range(self.plan.processes))
        self.board.replace()
        return self._fill(killed)

    def _fail(self, code: int) -> None:
        """Keeps an exit code; the other ranks are told, and get some time to end by themselves."""
        self.code = self.code or code
        self.board.fail()
        signal.alarm(END_SECONDS)

    def _send(self, number: int) -> None:
        for pid in self.ranks:
            os.kill(pid, number)  # it is a child that was not waited for, so the number is its own

    def _kill(self, pids: Iterable[int]) -> None:
        pids = [pid for pid in pids if pid]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            os.waitpid(pid, 0)


def _start_store(launcher: int) -> tuple[int, int]:
    """A process for the store by which ranks meet, which outlives each of them, and its port.

    It is a process of its own since a store has threads.
    """
    reads, writes = os.pipe()
    if pid := os.fork():
        os.close(writes)
        port = os.read(reads, 4)
        os.close(reads)
        return pid, struct.unpack("i", port)[0] if port else 0
    store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    os.write(writes, struct.pack("i", store.port))
    while True:
        _end_without(launcher)
        time.sleep(1)


def _end_without(launcher: int) -> None:
    """Ends this process if its parent is gone."""
    if os.getppid() != launcher:
        os._exit(0)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        print(f"dist-train: {text}.", file=sys.stderr, flush=True)
