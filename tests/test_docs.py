"""The documentation is true: every command and Python block in it runs as printed, no link is dead.

The blocks of a page run in their order, in a copy of the tree in which Fashion-MNIST is the shipped sample,
recipes are one epoch long, and outfits for segmentation are few. Python blocks of a page share one session.
What a page says to the test:

- A block whose first line is a comment with a file's name, as `# my_model.py`, is written to that file.
- `<!-- needs: ... -->` before a block that can't run here: its syntax, files and keys are checked.
- `<!-- exit code: 2 -->` before a block that ends with an error.
- `<!-- printed -->` before a block of text: it is what the block above printed.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import json
import re
import shlex
import shutil
import socket
import socketserver
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from dist_train.config import Config, load
from dist_train.config.schema import all_keys
from tests import warm
from tests.processes import REPO, environment, kill

PAGES = [REPO / "README.md", REPO / "slurm/README.md", *sorted((REPO / "docs").glob("*.md"))]
LINKING = [*PAGES, *(p for p in REPO.glob("*.md") if p not in PAGES), *REPO.glob("[b-s]*/README.md")]
LANGUAGES = {"bash", "python", "yaml", "text", "mermaid"}
NEEDS = {"gpus", "mac", "nodes", "slurm", "account", "network"}
SECONDS = 300  # that one block may take


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    note: str  # the HTML comment before it
    code: str

    @property
    def file(self) -> str:
        """The file that it is, or an empty text."""
        match = re.match(r"# ([\w/.-]+\.(py|ya?ml))\n", self.code)
        return match[1] if match else ""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page."""
    name = str(page.relative_to(REPO))
    fence: tuple[int, str, str] | None = None
    note, code = "", []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("```"):
            if fence:
                yield Block(name, *fence, "\n".join(code) + "\n")
                fence, note, code = None, "", []
            else:
                fence = (number, line[3:].strip(), note)
        elif fence:
            code.append(line)
        elif comment := re.fullmatch(r"<!-- (.+) -->", line):
            note = comment[1]
        elif line.strip():
            note = ""
    assert fence is None, f"{name}: a block is not closed"


# --- running ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def followed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Path, Future[str]]]:
    """What is wrong with each page whose test was asked for; pages are followed side by side."""
    name = test_every_block_runs_as_printed.__name__
    asked = [item.callspec.params["page"] for item in request.session.items if item.name.startswith(name)]
    place = str(tmp_path_factory.mktemp("warm") / "socket")
    warm.serve()
    with WarmServer(place, Asked) as server, ThreadPoolExecutor(max_workers=2) as pool:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield {
            page: pool.submit(follow, page, make_tree(tmp_path_factory.mktemp(page.stem), place))
            for page in asked
        }
        pool.shutdown(cancel_futures=True)
        server.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_runs_as_printed(
    page: Path, followed: dict[Path, Future[str]], missing: Callable[[str], NoReturn]
) -> None:
    if "make " in page.read_text() and not shutil.which("make"):
        missing("make is not here")
    wrong = followed[page].result()
    assert not wrong, wrong


def follow(page: Path, tree: Path) -> str:
    """Does what a page says, block after block; returns what is wrong with the first one that fails."""
    printed = ""
    session = Session(tree)
    try:
        for block in blocks(page):
            expected = int(block.note.removeprefix("exit code: ")) if "exit code" in block.note else 0
            code = expected
            if block.language not in LANGUAGES:
                return f"{block}: a kind of block that this test does not know: {block.language!r}"
            if block.language == "text":
                if block.note == "printed" and trimmed(printed) != trimmed(block.code):
                    return f"{block}: the block above prints\n{printed}"
            elif block.file:
                (tree / block.file).write_text(block.code)
            elif block.note.startswith("needs: "):
                check_unrun(block, tree)
            elif block.language == "yaml":
                (tree / "block.yaml").write_text(block.code)
                load([tree / "block.yaml"], [] if "epochs" in block.code else ["train.epochs=1"])
            elif block.language == "bash":
                code, printed = run_bash(block, tree)
            elif block.language == "python":
                code, printed = session.run(block.code)
            if code != expected:
                return f"{block} ended with {code}:\n{block.code}\n{printed}"
    except Exception as error:
        return f"{block}: {type(error).__name__}: {error}\n{block.code}"
    finally:
        session.close()
    return ""


def make_tree(parent: Path, server: str) -> Path:
    """A copy of the repository with a small Fashion-MNIST, short recipes, and an installed .venv.

    Args:
        server: the socket of a `WarmServer`.
    """
    top = parent / "dist_train"
    left = {".git", ".venv", "runs", "data", "wandb", "build", "dist", "site"}
    for item in REPO.iterdir():
        if item.name in left or item.name.endswith("_cache"):
            continue
        if item.is_dir():
            shutil.copytree(item, top / item.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            top.mkdir(exist_ok=True)
            shutil.copy2(item, top)
    source = top / "dist_train/data/fashion_mnist.py"
    text = source.read_text()
    assert text.count('DEBIAN = Path("/usr/share/datasets/fashion-mnist")') == 1
    source.write_text(text.replace('Path("/usr/share/datasets/fashion-mnist")', "ASSETS"))
    masks = top / "examples/write_masks.py"
    text = masks.read_text()
    assert text.count('("train", 600), ("val", 150)') == 1
    masks.write_text(text.replace('("train", 600), ("val", 150)', '("train", 96), ("val", 32)'))
    for recipe in (top / "configs").rglob("*.yaml"):
        short = re.sub(r"\bepochs: \d+", "epochs: 1", recipe.read_text())
        short = re.sub(r"\bwarmup: \d+", "warmup: 2", short)
        recipe.write_text(short.replace("  name: image_masks", "  name: image_masks\n  workers: 0"))
    programs = top / ".venv/bin"
    programs.mkdir(parents=True)
    (programs / "python").write_text(PYTHON.format(programs=programs, python=shlex.quote(sys.executable)))
    (programs / "dist-train").write_text(DIST_TRAIN.format(python=sys.executable, server=server))
    torchrun = Path(torch.__file__).parent / "distributed/run.py"
    (programs / "torchrun").write_text(TORCHRUN.format(programs=programs, script=torchrun))
    for program in programs.iterdir():
        program.chmod(0o755)
    (programs / "activate").write_text(f"export PATH={shlex.quote(str(programs))}:$PATH\n")
    for stamp in ("installed", "installed-dev"):  # younger than pyproject.toml: make has nothing to install
        (top / ".venv" / stamp).touch()
    return top


# Scripts are forked, too, and torchrun with its ranks.
PYTHON = """#!/bin/sh
case "$1" in *.py) exec {programs}/dist-train "$@" ;; esac
case "$*" in "-u -m dist_train "*) shift 3 && exec {programs}/dist-train "$@" ;; esac
exec {python} "$@"
"""
TORCHRUN = """#!/bin/sh
PYTHON_EXEC={programs}/python exec {programs}/dist-train {script} "$@"
"""

# The program, forked from a process that has imported torch, which takes seconds.
DIST_TRAIN = """#!{python} -ISu
import json, os, socket, sys

with socket.socket(socket.AF_UNIX) as server:
    server.connect({server!r})
    outputs = ["/proc/%d/fd/%d" % (os.getpid(), number) for number in (1, 2)]
    asked = [sys.argv[1:], os.getcwd(), dict(os.environ), *outputs]
    server.sendall(json.dumps(asked).encode() + b"\\n")
    code = int(server.makefile().readline())
sys.exit(code if code >= 0 else 128 - code)
"""


class WarmServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """Runs the commands of DIST_TRAIN."""

    daemon_threads = True


class Asked(socketserver.StreamRequestHandler):
    """One command."""

    def handle(self) -> None:
        """Runs it, and answers with its exit code."""
        arguments, folder, env, output, errors = json.loads(self.rfile.readline())
        process = warm.Process(arguments, Path(folder), env, Path(output), Path(errors))
        self.wfile.write(b"%d\n" % process.wait(SECONDS))


def variables(tree: Path) -> dict[str, str]:
    """The environment of the blocks: as if a person had activated the .venv."""
    places = [tree / ".venv/bin", Path(sys.executable).parent]
    ours = environment(WANDB_MODE="disabled", PYTHONPATH=tree, HOME=tree.parent)
    return ours | {"PATH": ":".join([*map(str, places), ours.get("PATH", "")])}


def run_bash(block: Block, tree: Path) -> tuple[int, str]:
    """The exit code of a block in a shell of its own, and what it printed."""
    # `make test` would run this test again: make only says what it would do.
    code = "exec 2>&1\n" + re.sub(r"^make test", "make -n test", block.code, flags=re.M)
    process = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", code], cwd=tree, env=variables(tree), text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    timer = threading.Timer(SECONDS, kill, [process])
    timer.start()
    printed, _ = process.communicate()
    timer.cancel()
    return process.returncode, printed


class Session:
    """A Python session that runs blocks one after the other, as a reader does who types them in."""

    def __init__(self, tree: Path) -> None:
        self.tree = tree
        self.process: warm.Process | None = None

    def run(self, code: str) -> tuple[int, str]:
        """The exit code that the block would have as a program, and what it printed."""
        if self.process is None:
            self._start()
        timer = threading.Timer(SECONDS, kill, [self.process])
        timer.start()
        self.stream.write(json.dumps(code) + "\n")
        self.stream.flush()
        answer = self.stream.readline()
        timer.cancel()
        failed, printed = json.loads(answer or '[true, "the session ended"]')
        return int(failed), printed

    def _start(self) -> None:
        place, said = (str(self.tree.parent / name) for name in ("session", "said"))
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(place)
            listener.listen()
            listener.settimeout(SECONDS)
            self.process = warm.Process([converse, place], self.tree, variables(self.tree), said, said)
            connection, _ = listener.accept()
        self.stream = connection.makefile("rw", encoding="utf-8")

    def close(self) -> None:
        """Ends the session."""
        if self.process:
            kill(self.process)
            self.process.wait()


def converse(place: str) -> None:
    """Runs the blocks that come from a socket, in one namespace; answers with failure and output of each."""
    space = {"__name__": "__main__"}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(place)
        for line in connection.makefile(encoding="utf-8"):
            printed, failed = io.StringIO(), False
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                try:
                    exec(compile(json.loads(line), "<block>", "exec"), space)
                except BaseException:
                    failed = True
                    traceback.print_exc()
            connection.sendall(json.dumps([failed, printed.getvalue()]).encode() + b"\n")


def check_unrun(block: Block, tree: Path) -> None:
    """What can be told of a block without running it."""
    needs = {need.strip() for need in block.note.removeprefix("needs: ").split(",")}
    assert needs <= NEEDS, f"{block}: needs {needs - NEEDS}?"
    if block.language == "python":
        ast.parse(block.code)
        return
    checked = subprocess.run(["bash", "-n"], input=block.code, text=True, capture_output=True)
    assert checked.returncode == 0, f"{block}: {checked.stderr}"
    for line in block.code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        for word in words:
            if re.match(r"(launch|configs|slurm|examples|docs)/", word):
                assert (tree / word).exists(), f"{block}: there is no {word}"
        command = "launch" if words[:2] == ["dist-train", "launch"] else "train"
        if command in words and {"dist-train", "dist_train"} & set(words):
            arguments = [w for w in words[words.index(command) + 1 :] if not w.startswith("-")]
            load([tree / a for a in arguments if "=" not in a], [a for a in arguments if "=" in a])


def trimmed(text: str) -> list[str]:
    """The lines of a text without what can't be seen."""
    return [line.rstrip() for line in text.strip().splitlines()]


# --- reading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", LINKING, ids=lambda page: str(page.relative_to(REPO)))
def test_no_link_is_dead(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    for target in targets:
        if re.match(r"(https?|mailto):", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{page.name}: {target} leads nowhere"
        assert found.is_relative_to(REPO), f"{page.name}: {target} leads out of the repository"
        if anchor and found.suffix == ".md":
            assert anchor in anchors(found), f"{page.name}: {target}: no such heading"


def anchors(page: Path) -> set[str]:
    """The names that a code host gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_key_file_and_test_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    keys = set(all_keys())
    free = ("data.args.", "model.args.", "task.args.", "optim.args.", "schedule.args.")
    sections = "|".join(item.name for item in fields(Config) if is_dataclass(getattr(Config(), item.name)))
    for key in re.findall(rf"`((?:{sections})\.[a-z_.]+)[`=]", text):
        known = key in keys or key.startswith(free)
        assert known or key.endswith((".py", ".yaml", ".safetensors", ".")), (
            f"{page.name}: there is no key {key}"
        )
    tests = "\n".join(file.read_text() for file in (REPO / "tests").rglob("*.py"))
    for name in re.findall(r"\btest_\w+\b(?!\.py)", text):
        assert f"def {name}(" in tests, f"{page.name}: there is no test {name}"
    for path in re.findall(r"`((?:dist_train|launch|configs|examples|tests|docs)/[\w/.-]+)`", text):
        assert (REPO / path).exists(), f"{page.name}: there is no {path}"


def test_the_configuration_reference_is_up_to_date() -> None:
    script = REPO / "docs/write_configuration.py"
    spec = importlib.util.spec_from_file_location("write_configuration", script)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = (REPO / "docs/configuration.md").read_text(encoding="utf-8")
    assert written == module.page(), "run: python docs/write_configuration.py"
