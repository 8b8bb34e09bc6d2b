"""A hook of mkdocs: pages stay as a code host shows them, and what they link to comes along.

README.md is the home page. A link to a file that is no page leads to a page that shows it. A diagram is
shown as the picture that was drawn of it, and as text from when it is changed until it is drawn anew
(CONTRIBUTING.md): the program that draws in the browser has megabytes.
"""

from __future__ import annotations

import hashlib
import logging
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

log = logging.getLogger("mkdocs.hooks.site")
REPO = Path(__file__).resolve().parents[2]
DOCS = REPO / "docs"
# Pages from outside of docs/, by their places in the site.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks/index.md",
    "slurm/README.md": "slurm.md",
}
FENCE = re.compile(r"^```.*?^```$", re.M | re.S)
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)\s#]+)(?=[)#])")


def on_config(config: Any) -> Any:
    """Puts pages that the navigation does not list under More."""
    entries = [entry for section in config.nav for pages in section.values() for entry in pages]
    listed = {next(iter(entry.values())) if isinstance(entry, dict) else entry for entry in entries}
    pages = sorted({page.name for page in DOCS.glob("*.md")} | set(PAGES.values()))
    if more := [page for page in pages if page not in listed]:
        config.nav.append({"More": more})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages and pictures from outside of docs/, and the files that pages link to."""
    for source, place in PAGES.items():
        files.append(File.generated(config, place, abs_src_path=str(REPO / source)))
    for path in sorted(
        {path for page in [*DOCS.glob("*.md"), *map(REPO.joinpath, PAGES)] for path in _linked(page)}
    ):
        place = _place(path)
        if path.suffix in (".png", ".svg"):
            if place not in files.src_uris:
                files.append(File.generated(config, place, abs_src_path=str(path)))
        elif place.startswith("files/"):
            files.append(File.generated(config, place, content=_shown(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Leads links to where things are in the site, and shows diagrams as pictures."""
    inverse = {place: source for source, place in PAGES.items()}
    uri = page.file.src_uri
    if uri.startswith("files/"):
        return markdown
    source = REPO / inverse.get(uri, f"docs/{uri}")

    def led(match: re.Match[str]) -> str:
        place = _place((source.parent / match[1]).resolve())
        return posixpath.relpath(place, posixpath.dirname(uri) or ".")

    parts, end = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [LINK.sub(led, markdown[end : fence.start()]), _fenced(fence[0], uri)]
        end = fence.end()
    return "".join([*parts, LINK.sub(led, markdown[end:])])


def _linked(page: Path) -> Iterator[Path]:
    """The files and folders of the repository that a page links to."""
    for target in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        path = (page.parent / target).resolve()
        if path.exists():
            yield path


def _place(path: Path) -> str:
    """Where a file of the repository is in the site."""
    name = path.relative_to(REPO).as_posix()
    if (page := f"{name}/README.md" if path.is_dir() else name) in PAGES:
        return PAGES[page]
    if path.suffix in (".md", ".png", ".svg"):
        return name.removeprefix("docs/")
    return f"files/{name}.md"


def _shown(path: Path) -> str:
    """A page with a file's text, or with the names of a folder's files."""
    name = path.relative_to(REPO).as_posix()
    if path.is_dir():
        text = "\n".join(sorted(file.name for file in path.glob("[!_.]*"))) + "\n"
    else:
        text = path.read_text(encoding="utf-8").replace("````", "")
    kind = {".py": "python", ".yaml": "yaml", ".sbatch": "bash"}.get(path.suffix, "text")
    return f"---\nsearch: {{exclude: true}}\n---\n# {name}\n\n````{kind}\n{text}````\n"


def _fenced(block: str, uri: str) -> str:
    """A block of code as it is; a diagram as the picture that was drawn of it, if there is one."""
    if not block.startswith("```mermaid\n"):
        return block
    picture = f"images/diagram-{hashlib.sha256(block.encode()).hexdigest()[:8]}.svg"
    if not (DOCS / picture).exists():
        log.info(f"{uri}: the diagram is shown as text, as there is no docs/{picture}")
        return block.replace("```mermaid", "```text", 1)
    place = posixpath.relpath(picture, posixpath.dirname(uri) or ".")
    return f"[![The diagram; it opens in full]({place})]({place})"
