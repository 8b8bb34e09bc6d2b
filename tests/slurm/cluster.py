"""A throwaway real Slurm on this machine: private munged, slurmctld and several slurmd.

Nothing of a Slurm that may be installed here is used or touched: its ports are free ones, its files
lie in the folder that is given, and SLURM_CONF is set for the commands that `run` starts only.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import psutil

from tests.processes import environment, free_port
from tests.slurm.commands import Commands

PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"])
NODE = "NodeName={} NodeHostname={} NodeAddr=127.0.0.1 Port={} CPUs=4 RealMemory=4000 Gres=gpu:2\n"


def missing() -> list[str]:
    """What is not installed of the programs that `Cluster` needs."""
    needed = ("munged", "slurmctld", "slurmd", "srun")
    return [name for name in needed if shutil.which(name, path=PATH) is None]


class Cluster(Commands):
    """Nodes n1, n2, … with 4 CPUs and 2 GPUs each in name; `with Cluster(folder) as cluster`.

    Jobs in the partition `low`, the default, are requeued when those in `high` need their nodes.
    """

    def __init__(self, folder: Path, nodes: int = 2) -> None:
        super().__init__(folder, {"SLURM_CONF": str(folder / "slurm.conf")})
        self.nodes = [f"n{number + 1}" for number in range(nodes)]
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def kill_node(self, node: str, jobs: bool = False) -> None:
        """SIGKILL for a node's slurmd; Slurm notices some 20 s later, and requeues the node's jobs.

        What ran on the node lives on, unless `jobs`, which is what a power failure does.
        """
        self._daemons[node].kill()
        self._daemons.pop(node).wait()
        for process in self._steps(node) if jobs else []:
            with contextlib.suppress(psutil.Error):
                process.kill()

    def start_node(self, node: str) -> None:
        """Starts a node's slurmd."""
        self._daemon(node, "slurmd", "-D", "-N", node)

    def wait_until_idle(self, timeout: float = 60) -> None:
        """Waits until all nodes are up and no job holds one."""
        deadline = time.monotonic() + timeout
        command = ["sinfo", "--noheader", "--Node", "--partition=low", "--format=%T"]
        while (states := self.run(command).stdout.split()) != ["idle"] * len(self.nodes):
            ended = [name for name, daemon in self._daemons.items() if daemon.poll() is not None]
            if ended or time.monotonic() > deadline:
                logs = [f"{log}: {log.read_text()[-2000:]}" for log in self.folder.glob("*.log")]
                raise RuntimeError("\n".join([f"nodes: {states}; daemons ended: {ended}", *logs]))
            time.sleep(0.1)

    def processes(self) -> list[psutil.Process]:
        """All processes of this cluster and of its jobs."""
        found = set().union(*map(self._steps, self.nodes))
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("SLURM_CONF") == self.variables["SLURM_CONF"]:
                    found.add(process)
        return [process for process in found if process.is_running()]

    def _steps(self, node: str) -> set[psutil.Process]:
        """The slurmstepds of a node, known by sockets in its spool folder, and their children."""
        spool = f"{self.folder}/spool-{node}/"
        sockets = psutil.net_connections("unix")
        found = set()
        for pid in {entry.pid for entry in sockets if str(entry.laddr).startswith(spool)}:
            with contextlib.suppress(psutil.Error):
                step = psutil.Process(pid)
                found |= {step, *step.children(recursive=True)}
        return found

    def stop(self) -> None:
        """Kills all jobs and daemons; waits until they are gone."""
        deadline = time.monotonic() + 30
        while (left := self.processes()) and time.monotonic() < deadline:
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(left, timeout=0.5)
        for daemon in self._daemons.values():
            daemon.kill()
            daemon.wait(5)

    def _start(self) -> None:
        folder, host = self.folder, socket.gethostname().split(".")[0]
        folder.chmod(0o755)
        for name in ("state", *(f"spool-{node}" for node in self.nodes)):
            (folder / name).mkdir()
        template = Path(__file__).with_name("slurm.conf").read_text()
        text = template.format(folder=folder, host=host, port=free_port())
        nodes = [NODE.format(node, host, free_port()) for node in self.nodes]
        (folder / "slurm.conf").write_text("".join([text, *nodes]))
        gpus = f"NodeName={','.join(self.nodes)} Name=gpu File=/dev/tty[0-1]\n"
        (folder / "gres.conf").write_text(gpus)
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o400)
        suffixes = {"key-file": "key", "socket": "sock", "pid-file": "pid", "seed-file": "seed"}
        files = [f"--{option}={folder}/munge.{suffix}" for option, suffix in suffixes.items()]
        self._daemon("munged", "munged", "--foreground", "--force", *files)
        deadline = time.monotonic() + 20
        while not (folder / "munge.sock").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        self._daemon("slurmctld", "slurmctld", "-D")
        for node in self.nodes:
            self.start_node(node)
        self.wait_until_idle()

    def _daemon(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                command, env=environment(**self.variables, PATH=PATH), start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.folder,
            )  # fmt: skip
