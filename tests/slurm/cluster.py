"""A throwaway real Slurm on this machine: private munged, slurmctld and two slurmd in one folder.

Nothing of a Slurm that may be installed here is used or touched: its ports are free ones, its files lie in
the folder that is given, and SLURM_CONF is set for the commands that `run` starts, and for no others.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from tests.conftest import environment, free_port

NEEDED = ("munged", "slurmctld", "slurmd", "srun")

CONFIGURATION = """
ClusterName=throwaway
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CryptoType=crypto/munge
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
KillWait=5
SlurmdTimeout=10
InactiveLimit=0
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={node1} CPUs=4 RealMemory=1000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={node2} CPUs=4 RealMemory=1000
PartitionName=low Nodes=n[1-2] Default=YES MaxTime=60 State=UP
"""


def missing() -> list[str]:
    """What is not installed of the programs that `Cluster` needs."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"])
    return [name for name in NEEDED if shutil.which(name, path=path) is None]


class Cluster:
    """Two nodes, n1 and n2, with four CPUs each in name; `with Cluster(folder) as cluster`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.variables = {"SLURM_CONF": str(folder / "slurm.conf")}
        self._pid_files = [
            folder / name for name in ("slurmd-n1.pid", "slurmd-n2.pid", "slurmctld.pid", "munge.pid")
        ]

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def run(
        self, command: list[Any], cwd: Path | None = None, timeout: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """Runs a Slurm command to its end, as a user of this cluster would."""
        return subprocess.run(
            [str(word) for word in command], cwd=cwd, env=environment(**self.variables), text=True,
            capture_output=True, timeout=timeout, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def _start(self) -> None:
        folder = self.folder
        for name in ("state", "spool-n1", "spool-n2"):
            (folder / name).mkdir()
        folder.chmod(0o755)
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        host = socket.gethostname().split(".")[0]
        (folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                folder=folder, host=host, controller=free_port(), node1=free_port(), node2=free_port()
            )
        )
        self._daemon(
            "munged", "--force", f"--key-file={key}", f"--socket={folder}/munge.sock",
            f"--pid-file={folder}/munge.pid", f"--log-file={folder}/munge.log",
            f"--seed-file={folder}/munge.seed",
        )  # fmt: skip
        self._daemon("slurmctld", "-c", "-f", folder / "slurm.conf")
        for node in ("n1", "n2"):
            self._daemon("slurmd", "-c", "-N", node, "-f", folder / "slurm.conf")
        deadline = time.monotonic() + 60
        states: list[str] = []
        while states != ["idle", "idle"]:
            if time.monotonic() > deadline:
                raise RuntimeError(f"the nodes did not come up: {states}\n{self._logs()}")
            time.sleep(0.2)
            states = self.run(["sinfo", "--noheader", "--Node", "--format=%T"]).stdout.split()

    def _daemon(self, *command: Any) -> None:
        words = [str(word) for word in command]
        path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"])
        started = subprocess.run(
            words, env=environment(**self.variables, PATH=path), capture_output=True, text=True, timeout=60
        )
        if started.returncode:
            raise RuntimeError(f"{words[0]} did not start: {started.stderr}")

    def stop(self) -> None:
        """Ends all jobs, then the daemons; waits until they are gone."""
        if self._pid_files[2].exists():
            with contextlib.suppress(subprocess.SubprocessError):
                self.run(["scancel", "--full", "--user=root", "--signal=KILL"], timeout=20)
        for file in self._pid_files:
            with contextlib.suppress(FileNotFoundError, ValueError, ProcessLookupError):
                pid = int(file.read_text())
                os.kill(pid, signal.SIGTERM)
                for _ in range(100):
                    os.kill(pid, 0)
                    time.sleep(0.1)
                os.kill(pid, signal.SIGKILL)

    def _logs(self) -> str:
        return "\n".join(f"--- {log.name}\n{log.read_text()[-2000:]}" for log in self.folder.glob("*.log"))
